"""Continue a prompt with a trained model, or say how well the model predicts a text."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from fira import cli, encode, load_model
from fira.data.tokenizer import eos_id, load_tokenizer
from fira.devices import choose_devices
from fira.errors import UserError
from fira.generation.options import add_sampling, sampling
from fira.generation.perplexity import perplexity
from fira.generation.text import continue_text, own_tokenizer, text_or_content
from fira.models.language_model import LanguageModel


def main() -> None:
    parser = cli.Parser(__doc__)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--checkpoint", help="a run folder (its latest checkpoint), a step folder or an exported folder")
    place.add_argument("--model-name", help="the same by its name in out/, with or without extension")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: the checkpoint's own")
    parser.add_argument("--prompt", help="a text, or - for standard input; default: none, a new document begins")
    length = ("--max-new-tokens", "--max-length", "--max-num-tokens")
    parser.add_argument(*length, type=int, default=100, help="tokens to write (default: %(default)s)")
    add_sampling(parser)
    parser.add_argument("--draft", metavar="CHECKPOINT", help="a smaller model that guesses ahead, to be faster")
    parser.add_argument("--beams", type=int, help="the likeliest text that a search with this many beams finds")
    parser.add_argument("--eval-text", help="a text, or a file with one: print how well it is predicted")
    options = parser.parse_args()
    device = choose_devices("auto", None, 0)[0]
    model = load_model(named(options.model_name) if options.model_name else options.checkpoint, device)
    if options.tokenizer:
        model.tokenizer = load_tokenizer(options.tokenizer)
    if model.tokenizer is None:
        raise UserError(
            f"{options.checkpoint or options.model_name}: no tokenizer there; give its data's as --tokenizer"
        )
    if options.eval_text is not None:
        text = text_or_content(options.eval_text)
        ids = [eos_id(model.tokenizer), *encode(text, model.tokenizer)]  # a document follows the end of another
        print(perplexity(model, ids).describe(len(text.encode())))
    if options.eval_text is None or options.prompt is not None:
        write(model, load_model(options.draft, device) if options.draft else None, options)


def named(name: str) -> Path:
    """The folder of a model that stands in out/: its own, or that in which the file of this name lies."""
    for path in (Path("out", name), Path("out", name).with_suffix(""), Path("out", f"{name}.safetensors")):
        if path.exists():
            return path if path.is_dir() else path.parent
    raise UserError(f"--model-name {name}: neither a folder nor a file of this name in out/; give --checkpoint")


def write(model: LanguageModel, draft: LanguageModel | None, options: Namespace) -> None:
    """Print the prompt and what follows it, as it comes; then length and speed, on stderr."""
    if options.max_new_tokens < 1:
        raise UserError(f"there is nothing to write in {options.max_new_tokens} tokens; ask for a greater length")
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
        report(text, pieces, started)
        return
    print(text, end="", flush=True)
    written = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            written += piece
    except KeyboardInterrupt:  # enough
        pass
    print()
    count, seconds = len(encode(written, tokenizer)), time.perf_counter() - started
    print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)


def report(prompt: str, pieces: Iterator[str], started: float) -> None:
    """All of it with headings, the text as it comes."""
    print(f"Prompt: {prompt}\nGenerated text: ", end="", flush=True)
    length = 0
    for piece in pieces:
        print(piece, end="", flush=True)
        length += len(piece)
    print(f"\nGenerated text length: {length} characters\nInference time: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    cli.run(main)
