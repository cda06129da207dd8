"""Continue a prompt with a trained model, or say how well the model predicts a text."""

import sys
import time
from argparse import Namespace

from tokenizers import Tokenizer

from fira import cli, encode, load_model
from fira.data.tokenizer import eos_id, load_tokenizer
from fira.errors import UserError
from fira.generation.perplexity import perplexity
from fira.generation.text import continue_text, text_or_content
from fira.models.language_model import LanguageModel
from fira.training.hardware import choose_devices


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run folder (its latest checkpoint) or a step folder")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: the checkpoint's own")
    parser.add_argument("--prompt", help="default: none, a new document begins")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write (default: %(default)s)")
    length.add_argument("--max-length", type=int, help="the same with the prompt's tokens counted too")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest tokens of this joint probability")
    parser.add_argument("--seed", type=int, help="the same seed writes the same text")
    parser.add_argument("--eval-text", help="a text, or a file with one: print how well it is predicted")
    options = parser.parse_args()
    model = load_model(options.checkpoint, choose_devices("auto", None, 0)[0])
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else model.tokenizer
    if tokenizer is None:
        raise UserError(f"{options.checkpoint} holds no tokenizer; give that of its data as --tokenizer")
    if options.eval_text is not None:
        text = text_or_content(options.eval_text)
        ids = [eos_id(tokenizer), *encode(text, tokenizer)]  # in training a document follows the end of another
        print(perplexity(model, ids).describe(len(text.encode())))
    if options.eval_text is None or options.prompt is not None:
        write(model, tokenizer, options)


def write(model: LanguageModel, tokenizer: Tokenizer, options: Namespace) -> None:
    """Print the prompt and what follows it, as it comes; then the speed, on stderr."""
    prompt = encode(options.prompt or "", tokenizer)
    count = options.max_new_tokens if options.max_length is None else options.max_length - len(prompt)
    if count < 1:
        raise UserError(f"there is nothing to write after a prompt of {len(prompt)} tokens; ask for a greater length")
    print(options.prompt or "", end="", flush=True)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    started, written = time.perf_counter(), 0
    for piece in continue_text(model, tokenizer, prompt, count, **sampling):
        print(piece, end="", flush=True)
        written += 1
    print()
    print(f"{written} tokens, {written / (time.perf_counter() - started):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
