"""Write a trained model as a folder that transformers loads: python scripts/export.py --checkpoint RUN --out FOLDER"""

from fira import cli
from fira.huggingface.export import FORMATS, export

FORMAT = """fira: the model's own code goes along (trust_remote_code=True); llama, of a mooshak, flexolmo, of a rish: a
class of transformers' own, for every tool that knows it (default: %(default)s)"""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run folder, a step folder or an exported folder")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--format", choices=FORMATS, default="fira", help=FORMAT)
    options = parser.parse_args()
    out = export(options.checkpoint, options.out, options.format)
    trust = ", trust_remote_code=True" if options.format == "fira" else ""
    print(f'next: AutoModelForCausalLM.from_pretrained("{out}"{trust})')


if __name__ == "__main__":
    cli.run(main)
