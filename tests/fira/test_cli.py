"""Log messages of the commands: streams, prefixes and levels."""

import logging

import pytest

from fira import cli

MESSAGES = [(logging.DEBUG, "detail"), (logging.INFO, "event"), (logging.WARNING, "problem")]


@pytest.fixture
def restored():
    yield
    for name in ("fira", "pipeline"):
        logger = logging.getLogger(name)
        logger.handlers, logger.level = [], logging.NOTSET


@pytest.mark.parametrize(
    ("quiet", "verbose", "rank", "out"),
    [
        (False, False, 0, "event\n"),
        (False, False, 1, ""),
        (True, False, 0, ""),
        (False, True, 1, "rank 1 DEBUG fira.x: detail\nrank 1 INFO fira.x: event\n"),
    ],
)
@pytest.mark.usefixtures("restored")
def test_information_goes_to_stdout_and_warnings_to_stderr(capsys, quiet, verbose, rank, out):
    cli.start_logging(quiet, verbose, rank)
    for level, message in MESSAGES:
        logging.getLogger("fira.x").log(level, message)
    captured = capsys.readouterr()
    assert captured.out == out
    assert captured.err == f"rank {rank} WARNING fira.x: problem\n"


def test_quiet_and_verbose_exclude_each_other():
    parser = cli.Parser("test")
    parser.add_verbosity()
    with pytest.raises(cli.UserError, match="not allowed with"):
        parser.parse_args(["--quiet", "--verbose"])


def test_windows_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: pytest.fail("a command has started"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "Fira's commands need Linux or macOS; on Windows, run them in WSL 2 (wsl --install)\n"
    )


def test_underscores_in_flag_names_equal_hyphens():
    """Underscores in values are unchanged."""
    parser = cli.Parser("test")
    parser.add_argument("--min-lr", type=float)
    parser.add_argument("--model-set")
    for words in (["--min_lr", "0.5", "--model_set=d_model=1"], ["--min-lr=0.5", "--model-set", "d_model=1"]):
        assert vars(parser.parse_args(words)) == {"min_lr": 0.5, "model_set": "d_model=1"}
