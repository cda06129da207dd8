"""Invalid values on the command line and in --config files."""

import argparse

import pytest

from fira.cli import Parser
from fira.errors import UserError
from fira.models.registry import PRESETS
from fira.training.config import PRESET_FAMILIES
from fira.training.flags import add_options
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
    "--model-set num_layers=2.5": "--model-set num_layers: give an integer from 1 to 1,024, not 2.5",
    "--model-set top_k=true": "or a number greater than 0 and at most 1, not true",
    "--model-set d_model=0": "--model-set d_model: give an integer from 1 to 262,144, not 0",
    "--model-set num_layers=-1": "--model-set num_layers: give an integer from 1 to 1,024, not -1",
    "--model mooshak-tiny --model-set norm_order=1": "--model-set norm_order: give a text",
    "--model mooshak-tiny --model-set norm_order=side": "norm_order 'side' is neither",
    "--lr -1": "--lr: give a number greater than 0, not '-1'",
    "--lr nan": "--lr: give a number greater than 0, not 'nan'",
    "--clip inf": "--clip: give a number of at least 0, not 'inf'",
    "--warmup -5": "--warmup: give an integer of at least 0, not '-5'",
    "--weight-decay -0.1": "--weight-decay: give a number of at least 0, not '-0.1'",
    "--optimizer sgd": "invalid choice: 'sgd'",
    "--beta1 1": "--beta1: give a number of at least 0 and less than 1, not '1'",
    "--eps 0": "--eps: give a number of at least 1.2e-38, not '0'",
    "--lr-schedule step": "invalid choice: 'step'",
    "--lr-decay 2": "--lr-decay: give a number from 0 to 1, not '2'",
    "--objective grpo --group-size 1": "--group-size 1: an answer is compared with others",
    "--answer-after=": "--answer-after: the text is empty",
    "--seed -1": "--seed: give an integer from 0 to 9,223,372,036,854,775,807, not '-1'",
    "--timeout 0": "--timeout: give a number greater than 0 and at most 1,000,000,000, not '0'",
    "--timeout nan": "--timeout: give a number greater than 0",
    "--min-lr=-inf": "--min-lr: give a number of at least 0, not '-inf'",
    "--batch-size 1000000000": "--batch-size: give an integer from 1 to 1,048,576",
    "--vocab-size 2147483648": "--vocab-size: give an integer from 1 to 16,777,216",
    "--model-set d_model=1000000000": "--model-set d_model: give an integer from 1 to 262,144",
    "--model-set n_head=0": "--model-set n_head: give an integer",
    "--model-set dropout=nan": "--model-set dropout: give a number of at least 0 and less than 1, not nan",
    "--data=": "--data: give a text without control characters that is not blank, not ''",
    "--out=": "--out: give a path",
    "--model rish-base --model-set num_layers=32": "needs about",
    "--batch-size 1048576 --micro-batch-size 1048576": "GB available; try --micro-batch-size",
    "--steps many": "--steps: give an integer of at least 1, not 'many'",
    "--save-every 5x": "--save-every 5x: give a number of steps above 0, or a time such as 600s",
    "--save-every 0": "--save-every 0: give a number of steps above 0",
    "--on-spike skip": "invalid choice: 'skip'",
    "--data no/such/file": "no/such/file",
    "--tokenizer setup.py": "setup.py: not a tokenizer.json",
    "--config setup.py": "setup.py is not TOML",
    "--resume tests": "tests: no checkpoint here",
    "--trace setup.py/trace.json": "setup.py/trace.json: File exists; choose a path that can be written",
    "--trace fira": "fira: Is a directory; choose a path that can be written",
    "--recompute some": "--recompute some: give none, full, auto, or a number",
    "--recompute 1 --local-devices cpu,cpu": "torchgpipe recomputes all or nothing",
    "--shard parameters --local-devices cpu,cpu": "torchgpipe keeps the weights of its 2 devices",
    "--init runs --lora rank=0,alpha=16,targets=head": "targets=head: give an integer from 1 to 262,144, not '0'",
    "--init runs --lora rank=8,alpha=16,targets=mlp": "no target 'mlp'; the targets are attention, experts, head",
    "--init runs --lora rank=8,targets=head": "give rank, alpha and targets once each, as in rank=8,alpha=16,targets=",
    "--init runs/a --model rish-tiny": "--model rish-tiny: the model is that of --init",
    "--lora rank=8,alpha=16,targets=head": "--lora: no model to adapt; give a run",
    "--plan maybe": "invalid choice: 'maybe'",
    "--seq-len 100000": "--seq-len",
    "--local-devices gpu:x": "--local-devices gpu:x",
    "--local-devices meta": "--local-devices meta: give devices of one type, cpu or cuda",
    "--model mooshak-tiny --model-set rope_factor=2,rope_low=4": "rope_low 4 must be less than rope_high 4.0",
    "--model rish-tiny --model-set d_model=8,n_kv_head=4,max_position=8": "head_dim 2: the base cannot grow",
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
        ("steps = 'many'", r"run.toml: argument --steps: give an integer of at least 1, not 'many'"),
        (
            "lr = [1, 2]",
            "run.toml: lr: give a text .* or true or false or a finite number, not a list",
        ),
        ("lr = nan", "run.toml: lr: give .* a finite number, not nan"),
        ("lr = -1", "run.toml: argument --lr: give a number greater than 0, not '-1'"),
        ("steps = 0x" + "f" * 5000, "run.toml: steps: give .*, not an integer of 20,000 bits"),
        ("steps = 1" + "0" * 5000, "run.toml is not TOML: Exceeds the limit"),
        ("lr = " + "[" * 5000, "run.toml is not TOML: maximum recursion depth exceeded"),
        ("a" + ".a" * 5000 + " = 1", "run.toml: unknown key a"),
        ("lr" + ".a" * 5000 + " = 1", "run.toml: lr: give .*, not a dict"),
        ("#" * (2**16 + 1), "run.toml: more than 65,536 bytes"),
        ('model = "\\u0000"', r"run.toml: model: give a text without control characters"),
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


def test_help_names_the_families_of_all_presets():
    families = PRESET_FAMILIES.replace(" or ", ", ").split(", ")
    assert {f"{family}-{size}" for family in families for size in ("base", "tiny")} == set(PRESETS)
