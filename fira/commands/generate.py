"""Continue a prompt with a trained model, or evaluate how well the model predicts a text."""

from collections.abc import Sequence

from fira import cli
from fira.generation.options import CHECKPOINT, add_quantize, add_sampling, add_tokenizer
from fira.value_types import PathName, Size


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    from fira.commands.continuation import continue_or_evaluate

    continue_or_evaluate(options)


def add_arguments(parser: cli.Parser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=PathName, help=CHECKPOINT)
    model.add_argument("--model-name", type=PathName, help="name of a model in out/, with or without extension")
    add_tokenizer(parser)
    parser.add_argument("--prompt", help="a text, or - for standard input; default: none, a new document begins")
    length = ("--max-new-tokens", "--max-length", "--max-num-tokens")
    parser.add_argument(*length, type=int, default=100, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, which the model answers")
    add_sampling(parser)
    add_quantize(parser)
    parser.add_argument("--draft", type=PathName, metavar="CHECKPOINT", help="a smaller model for speculative decoding")
    parser.add_argument("--beams", type=Size, help="beam search with this number of beams")
    parser.add_argument("--eval-text", help="a text, or a file with one: print how well it is predicted")
