"""Write a trained model as a folder that transformers loads."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from fira import cli
from fira.errors import UserError
from fira.generation.options import CHECKPOINT
from fira.value_types import PathName

FORMATS = ("fira", "llama", "flexolmo", "olmoe", "peft", "gguf")
FORMAT_HELP = """fira: with the code of the model (trust_remote_code=True); llama (for mooshak), flexolmo and olmoe
(for rish): as a class of transformers; peft: the adapters of a LoRA run; gguf (for mooshak
and rish-olmoe): a file for llama.cpp (default: %(default)s)"""
TYPES = ("f16", "q8_0", "q4_0")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    check(options)
    from transformers.utils.logging import disable_progress_bar

    from fira.huggingface.export_model import export, gguf_path

    if options.quiet or not sys.stderr.isatty():
        disable_progress_bar()  # of transformers
    kind = options.type or "f16"
    out = export(options.checkpoint, options.out, options.format, kind, progress=not options.quiet)
    if not options.quiet and options.format == "peft":
        print(f'next: PeftModel.from_pretrained(exported_base_model, "{out}")')
    elif not options.quiet and options.format == "gguf":
        print(f"next: llama-cli -m {gguf_path(out, kind)}")
    elif not options.quiet:
        trust = ", trust_remote_code=True" if options.format == "fira" else ""
        print(f'next: AutoModelForCausalLM.from_pretrained("{out}"{trust})')


def check(options: Namespace) -> None:
    """Raise UserError if the flags do not fit together."""
    if options.type and options.format != "gguf":
        raise UserError("--type is for --format gguf; give both, or neither")


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--checkpoint", type=PathName, required=True, help=CHECKPOINT)
    parser.add_argument("--out", type=PathName, required=True, help="a new folder")
    parser.add_argument("--format", choices=FORMATS, default="fira", help=FORMAT_HELP)
    type_help = "with --format gguf: 16 bits per weight, or blocks of 32 weights with 8 or 4 bits (default: f16)"
    parser.add_argument("--type", choices=TYPES, help=type_help)
