"""The continuation of a prompt and the perplexity of a text, as `fira generate` prints them."""

import sys
import time
from argparse import Namespace
from itertools import chain
from pathlib import Path

from fira import cli, encode
from fira.checkpoint.load_model import own_tokenizer
from fira.commands.loading import load
from fira.data.tokenizer import eos_id
from fira.errors import UserError
from fira.generation.conversation import own_template
from fira.generation.options import sampling
from fira.generation.perplexity import perplexity
from fira.generation.text import continue_text, text_or_content
from fira.models.language_model import LanguageModel

EXTENSIONS = (".safetensors", ".pt", ".pth")  # the last ones are refused with a reason


def continue_or_evaluate(options: Namespace) -> None:
    """Print the perplexity of `--eval-text` if it is given, and the continuation of `--prompt`."""
    folder, form = options.checkpoint or find_in_out(options.model_name), (options.quantize, options.quiet)
    model = load(folder, options.tokenizer, *form)
    if options.eval_text is not None:
        tokenizer, text = own_tokenizer(model), text_or_content(options.eval_text)
        ids = [eos_id(tokenizer), *encode(text, tokenizer)]  # in training, EOS precedes every document
        print(perplexity(model, ids).describe(len(text.encode())))
    if options.eval_text is None or options.prompt is not None:
        draft = load(options.draft, None, *form) if options.draft else None
        generate(model, draft, options)


def find_in_out(name: str) -> Path:
    """Return the folder or file out/NAME, with or without an extension."""
    path = Path("out", name)
    for base in (path, path.with_suffix("")):
        for found in (base, *(base.with_name(f"{base.name}{suffix}") for suffix in EXTENSIONS)):
            if found.exists():
                return found
    raise UserError(f"--model-name {name}: neither a folder nor a file of this name in out/; give --checkpoint")


def generate(model: LanguageModel, draft: LanguageModel | None, options: Namespace) -> None:
    """Print the prompt and its continuation while it is generated, then its length and the speed or time.

    With `--model-name` the output is that of the original MicroRWKV, all on stdout.
    """
    text = sys.stdin.read() if options.prompt == "-" else options.prompt or ""
    tokenizer = own_tokenizer(model)
    if options.chat:
        prompt = own_template(model).prompt([{"role": "user", "content": text}])
    else:
        prompt = encode(text, tokenizer)
    started = time.perf_counter()
    if options.beams:
        from fira.generation.beams import beam_pieces  # imports transformers

        pieces = beam_pieces(model, prompt, options.max_new_tokens, options.beams)
    else:
        pieces = continue_text(model, prompt, options.max_new_tokens, draft=draft, **sampling(options))
    shown = "" if options.chat else text
    first = next(pieces, "")  # before the prompt is printed, so that an error is all that is printed
    print(f"Prompt: {text}\n\nGenerated text: {shown}" if options.model_name else shown, end="", flush=True)
    generated = cli.print_pieces(chain([first], pieces))
    seconds = time.perf_counter() - started
    if options.model_name:
        length = len(shown + "".join(generated))
        print(f"\nGenerated text length: {length} | Inference time: {seconds:.2f} seconds")
    elif not options.quiet:
        print(f"{len(generated)} tokens, {len(generated) / seconds:.1f} tokens/s", file=sys.stderr)
