"""Write a trained model as a folder that transformers loads."""

from collections.abc import Sequence

from fira import cli
from fira.value_types import PathName

FORMATS = ("fira", "llama", "flexolmo", "olmoe", "peft")
FORMAT_HELP = """fira: with the code of the model (trust_remote_code=True); llama (for mooshak), flexolmo and olmoe
(for rish): as a class of transformers; peft: the adapters of a LoRA run (default: %(default)s)"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    checkpoint_help = "a run folder, a step folder or an exported folder"
    parser.add_argument("--checkpoint", type=PathName, required=True, help=checkpoint_help)
    parser.add_argument("--out", type=PathName, required=True, help="a new folder")
    parser.add_argument("--format", choices=FORMATS, default="fira", help=FORMAT_HELP)
    options = parser.start(arguments)
    from fira.huggingface.export_model import export

    out = export(options.checkpoint, options.out, options.format)
    if not options.quiet and options.format == "peft":
        print(f'next: PeftModel.from_pretrained(exported_base_model, "{out}")')
    elif not options.quiet:
        trust = ", trust_remote_code=True" if options.format == "fira" else ""
        print(f'next: AutoModelForCausalLM.from_pretrained("{out}"{trust})')
