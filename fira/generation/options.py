"""Command-line flags for sampling."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from fira.decoding.sampling import Sampling


def add_sampling(parser: ArgumentParser) -> None:
    """Add a flag for each field of `Sampling`, and `--stop`."""
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 selects the most probable token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="sample from the most probable tokens with this total probability")
    parser.add_argument(
        "--min-p", type=float, help="sample from tokens with at least this fraction of the highest probability"
    )
    parser.add_argument(
        "--typical-p", type=float, help="sample from the most typical tokens with this total probability"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: penalises tokens that occur in the text"
    )
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, help="above 0: the same by subtraction from the logits"
    )
    parser.add_argument("--no-repeat-ngram", type=int, metavar="N", help="do not generate a sequence of N tokens twice")
    parser.add_argument("--seed", type=int, help="seed of the sampling; equal seeds generate equal texts")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def sampling(options: Namespace) -> dict[str, Any]:
    """Return the parsed flags of `add_sampling` as keyword arguments of `continue_text`."""
    return {name: getattr(options, name) for name in (*(field.name for field in fields(Sampling)), "stop")}
