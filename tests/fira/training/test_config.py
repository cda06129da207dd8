"""Invalid values on the command line and in --config files."""

import argparse

import pytest

from fira.cli import Parser
from fira.errors import UserError
from fira.training.config import add_options
from tests.fira.training.small_runs import cache
from tests.launch import run_function

INVALID_FLAGS = {
    "--pp 3": "choose pp × dp = 1",
    "--ep 3": "--ep 3 does not divide",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--model fira-huge": "no such preset; choose from fira-base",
    "--model_set n_head=7": "not divisible by n_head 7",
    "--model-set colour=7": "fira-tiny has no field colour",
    "--model-set d_model": "give NAME=VALUE",
    "--model-set num_layers=2.5": "num_layers=2.5: num_layers must be int",
    "--model-set top_k=true": "top_k must be int or float",
    "--model-set d_model=0": "d_model=0: d_model must be greater than 0",
    "--model-set num_layers=-1": "num_layers=-1: num_layers must be greater than 0",
    "--model mooshak-tiny --model-set norm_order=1": "norm_order must be str",
    "--model mooshak-tiny --model-set norm_order=side": "norm_order 'side' is neither",
    "--lr -1": "--lr -1.0: must be greater than 0",
    "--lr nan": "--lr nan: must be a finite number",
    "--clip inf": "--clip inf: must be a finite number",
    "--warmup -5": "--warmup -5: must not be negative",
    "--weight-decay -0.1": "--weight-decay -0.1: must not be negative",
    "--seed -1": "--seed -1: must not be negative",
    "--save-every 5x": "--save-every 5x: give a number of steps above 0, or a time such as 600s",
    "--save-every 0": "--save-every 0: give a number of steps above 0",
    "--on-spike skip": "invalid choice: 'skip'",
    "--timeout 0": "--timeout 0.0: must be greater than 0",
    "--steps many": "invalid int value: 'many'",
    "--data no/such/file": "no/such/file",
    "--tokenizer setup.py": "setup.py: not a tokenizer.json",
    "--config setup.py": "setup.py is not TOML",
    "--resume tests": "tests: no checkpoint here",
    "--recompute some": "--recompute some: give none, full, auto, or a number",
    "--recompute 1 --local-devices cpu,cpu": "torchgpipe recomputes all or nothing",
    "--plan maybe": "invalid choice: 'maybe'",
    "--seq-len 100000": "--seq-len",
    "--local-devices gpu:x": "--local-devices gpu:x",
}


def test_invalid_flags_raise_one_line_errors(settings, tmp_path):
    flags = [["--config", str(settings), "--out", str(tmp_path / "run"), *words.split()] for words in INVALID_FLAGS]
    (messages,) = run_function(1, "tests.ranks.train_ranks", "messages", env=cache(settings), flags=flags)
    for message, (words, expected) in zip(messages, INVALID_FLAGS.items(), strict=True):
        assert "\n" not in message
        assert expected in message, words
    assert not (tmp_path / "run").exists()


def parse(tmp_path, text: str, *flags: str) -> argparse.Namespace:
    """Parse flags behind a --config file, with a parser that requires a flag as that of plan.py does."""
    path = tmp_path / "run.toml"
    path.write_text(text)
    parser = Parser("test", "test.py")
    add_options(parser, ("steps", "lr", "model"))
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_verbosity()
    return parser.parse_args(["--config", str(path), *flags])


def test_config_files_set_flags_that_later_flags_override(tmp_path):
    found = parse(tmp_path, 'steps = 3\nlr = 0.5\nmodel = "a"\nquiet = true\n', "--ranks", "2", "--lr", "0.25")
    assert (found.steps, found.lr, found.model, found.ranks, found.quiet) == (3, 0.25, "a", 2, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 'many'", r"run.toml: argument --steps: invalid int value: 'many'"),
        ("lr = [1, 2]", r"run.toml: argument --lr: invalid float value: '\[1, 2\]'"),
        ("lr = true", r"run.toml: argument --lr: expected one argument"),
        ("[training]\nlr = 1", r"run.toml: unknown key training"),
        ("pp = 2", r"run.toml: unknown key pp"),  # a setting that this program does not have
        ("ranks = 2", r"run.toml: unknown key ranks"),
        ("config = 'a.toml'", r"run.toml: unknown key config"),
        ("help = true", r"run.toml: unknown key help"),
    ],
)
def test_errors_in_a_config_file_name_the_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, text, "--ranks", "2")
