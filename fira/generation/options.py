"""The flags by which scripts that write are told how."""

from argparse import ArgumentParser, Namespace
from typing import Any

TEMPERATURE = 0.8


def add_sampling(parser: ArgumentParser) -> None:
    """A flag for each field of `Sampling`; and `--stop`."""
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="0: the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest tokens of this joint probability")
    parser.add_argument(
        "--min-p", type=float, help="choose among tokens this times as likely as the likeliest, or more"
    )
    parser.add_argument("--typical-p", type=float, help="choose among the most typical of this joint probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: against tokens already used")
    parser.add_argument("--presence-penalty", type=float, default=0.0, help="above 0: the same, by subtraction")
    parser.add_argument("--no-repeat-ngram", type=int, metavar="N", help="no N tokens stand in the text twice")
    parser.add_argument("--seed", type=int, help="the same seed writes the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def sampling(options: Namespace) -> dict[str, Any]:
    """Those of the flags that `continue_text` takes beside the length."""
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")
    return {name: getattr(options, name) for name in (*names, "no_repeat_ngram", "seed", "stop")}
