"""Continue a prompt with a trained model, or evaluate how well the model predicts a text."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from fira import cli, encode, load_model
from fira.checkpoint.load_model import own_tokenizer
from fira.data.tokenizer import eos_id, load_tokenizer
from fira.devices import choose_devices
from fira.errors import UserError
from fira.generation.options import add_sampling, sampling
from fira.generation.perplexity import perplexity
from fira.generation.text import continue_text, text_or_content
from fira.models.language_model import LanguageModel


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    cli.start_logging(options.quiet, options.verbose)
    device = choose_devices("auto", None, 0)[0]
    folder = options.checkpoint or find_in_out(options.model_name)
    model = load_model(folder, device)
    if options.tokenizer:
        model.tokenizer = load_tokenizer(options.tokenizer)
    if model.tokenizer is None:
        raise UserError(f"{folder}: it contains no tokenizer; give the one of its training data as --tokenizer")
    if options.eval_text is not None:
        text = text_or_content(options.eval_text)
        ids = [eos_id(model.tokenizer), *encode(text, model.tokenizer)]  # in training, EOS precedes every document
        print(perplexity(model, ids).describe(len(text.encode())))
    if options.eval_text is None or options.prompt is not None:
        generate(model, load_model(options.draft, device) if options.draft else None, options)


def add_arguments(parser: cli.Parser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="a run folder (its latest checkpoint), a step folder or an exported folder")
    model.add_argument("--model-name", help="name of a model in out/, with or without extension")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: the checkpoint's own")
    parser.add_argument("--prompt", help="a text, or - for standard input; default: none, a new document begins")
    length = ("--max-new-tokens", "--max-length", "--max-num-tokens")
    parser.add_argument(*length, type=int, default=100, help="tokens to generate (default: %(default)s)")
    add_sampling(parser)
    parser.add_argument("--draft", metavar="CHECKPOINT", help="a smaller model for speculative decoding")
    parser.add_argument("--beams", type=int, help="beam search with this number of beams")
    parser.add_argument("--eval-text", help="a text, or a file with one: print how well it is predicted")
    parser.add_verbosity()


def find_in_out(name: str) -> Path:
    """Return out/NAME if it is a folder, otherwise the folder of the file out/NAME or out/NAME.safetensors."""
    for path in (Path("out", name), Path("out", name).with_suffix(""), Path("out", f"{name}.safetensors")):
        if path.exists():
            return path if path.is_dir() else path.parent
    raise UserError(f"--model-name {name}: neither a folder nor a file of this name in out/; give --checkpoint")


def generate(model: LanguageModel, draft: LanguageModel | None, options: Namespace) -> None:
    """Print the prompt and its continuation while it is generated, then length and speed on stderr."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: must be greater than 0")
    text = sys.stdin.read() if options.prompt == "-" else options.prompt or ""
    tokenizer = own_tokenizer(model)
    prompt = encode(text, tokenizer)
    started = time.perf_counter()
    if options.beams:
        from fira.generation.beams import beam_text  # imports transformers

        pieces = iter([beam_text(model, prompt, options.max_new_tokens, options.beams)])
    else:
        pieces = continue_text(model, prompt, options.max_new_tokens, draft=draft, **sampling(options))
    if options.model_name:
        print_with_headings(text, pieces, started)
        return
    print(text, end="", flush=True)
    generated = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            generated += piece
    except KeyboardInterrupt:
        pass
    print()
    count, seconds = len(encode(generated, tokenizer)), time.perf_counter() - started
    if not options.quiet:
        print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)


def print_with_headings(prompt: str, pieces: Iterator[str], started: float) -> None:
    """Print prompt, continuation while it is generated, length and time, each with a heading."""
    print(f"Prompt: {prompt}\nGenerated text: ", end="", flush=True)
    length = 0
    for piece in pieces:
        print(piece, end="", flush=True)
        length += len(piece)
    print(f"\nGenerated text length: {length} characters\nInference time: {time.perf_counter() - started:.2f} s")
