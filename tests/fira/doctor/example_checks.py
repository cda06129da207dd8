"""GPU checks that succeed, fail, crash, hang or leave a process behind. Without torch, so that they start quickly."""

import os
import time

from fira.doctor.gpu_check import Target


def good(target: Target, word: str = "fine") -> str:
    print("a warning")
    return f"{word} on {target.device}\nwith | details"


def wrong(target: Target) -> str:
    raise AssertionError("the sum is 3 instead of 4")


def crashing(target: Target) -> str:
    print("before", flush=True)
    os.abort()


def ended(target: Target) -> str:
    os._exit(0)


def hanging(target: Target) -> str:
    print("waiting for a message", flush=True)
    time.sleep(600)
    return "never"


def leaving(target: Target) -> str:
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    return "done"
