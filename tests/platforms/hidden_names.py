"""What Python lacks on macOS and on Windows, and how to hide it on Linux (typeshed, the library's documentation)."""

import os
import select
import signal
import socket
import sys

LINUX_ONLY = (  # functions of os
    *("eventfd", "memfd_create", "pidfd_open", "pipe2", "posix_fadvise", "posix_fallocate", "sched_getaffinity"),
    *("sched_setaffinity", "splice"),
)
UNIX_ONLY = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "RTLD_GLOBAL", "RTLD_NOW", "WNOHANG"),
    *("WEXITSTATUS", "WIFEXITED", "WIFSIGNALED", "WTERMSIG", "chown", "fchown", "fork", "forkpty", "fstatvfs"),
    *("getegid", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid"),
    *("getuid", "initgroups", "killpg", "lchown", "mkfifo", "mknod", "nice", "openpty", "posix_spawn", "pread"),
    *("preadv", "pwrite", "pwritev", "register_at_fork", "sched_yield", "sendfile", "set_blocking", "setsid"),
    *("setuid", "statvfs", "sync", "sysconf", "uname", "wait", "wait3", "wait4", "waitid"),
)
UNIX_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
WINDOWS_SIGNALS = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")


def hide_linux() -> None:
    """Remove what macOS does not have."""
    for name in LINUX_ONLY:
        if hasattr(os, name):
            delattr(os, name)


def hide_unix() -> None:
    """Remove what Windows does not have, and let `sys.platform` be "win32"."""
    hide_linux()
    signals = [name for name in dir(signal) if name.startswith("SIG") and name not in WINDOWS_SIGNALS]
    waits = ["alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending", "sigtimedwait", "sigwait"]
    for module, names in (
        (os, UNIX_ONLY),
        (signal, signals + waits),
        (socket, ["AF_UNIX"]),
        (select, ["epoll", "poll"]),
    ):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.modules.update(dict.fromkeys(UNIX_MODULES))  # None: an import of this name raises ModuleNotFoundError
    sys.platform = "win32"
