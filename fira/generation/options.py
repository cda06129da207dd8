"""Command-line flags for checkpoint, sampling and quantisation."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from fira.decoding.sampling import Sampling
from fira.nn.quantization import FORMS
from fira.value_types import PathName, flag_type

CHECKPOINT = "a run folder (its latest checkpoint), a step folder, an exported folder or a safetensors file"
TOKENIZER = "a tokenizer.json, or tiktoken's o200k_base or r50k_base; default: the checkpoint's own"
DEFAULTS = Sampling(temperature=0.8)
HELP = {
    "temperature": "0 selects the most probable token (default: %(default)s)",
    "top_k": "sample from the k most probable tokens",
    "top_p": "sample from the most probable tokens with this total probability",
    "min_p": "sample from tokens with at least this fraction of the highest probability",
    "typical_p": "sample from the most typical tokens with this total probability",
    "repetition_penalty": "above 1: penalises tokens that occur in the text",
    "presence_penalty": "above 0: the same by subtraction from the logits",
    "no_repeat_ngram": "do not generate a sequence of this many tokens twice",
    "seed": "seed of the sampling; equal seeds generate equal texts",
}


def add_checkpoint(parser: ArgumentParser) -> None:
    """Add the flags `--checkpoint` and `--tokenizer`."""
    parser.add_argument("--checkpoint", type=PathName, required=True, help=CHECKPOINT)
    add_tokenizer(parser)


def add_tokenizer(parser: ArgumentParser) -> None:
    """Add the flag `--tokenizer`."""
    parser.add_argument("--tokenizer", type=PathName, help=TOKENIZER)


def add_sampling(parser: ArgumentParser) -> None:
    """Add a flag for each field of `Sampling`, and `--stop`."""
    types = {field.name: flag_type(field.type) for field in fields(Sampling)}
    for name, text in HELP.items():
        default = getattr(DEFAULTS, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=types[name], default=default, help=text)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def add_quantize(parser: ArgumentParser) -> None:
    """Add the flag `--quantize`."""
    text = "store the matrices of the blocks, and with +head the head, in 8 or 4 bits, on the CPU; default: as saved"
    parser.add_argument("--quantize", choices=FORMS, help=text)


def sampling(options: Namespace) -> dict[str, Any]:
    """Return the parsed flags of `add_sampling` as keyword arguments of `continue_text`."""
    return {name: getattr(options, name) for name in (*(field.name for field in fields(Sampling)), "stop")}
