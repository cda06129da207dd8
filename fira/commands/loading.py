"""Load the model of a command that generates text or evaluates."""

import sys
from pathlib import Path

from fira import load_model
from fira.data.tokenizer_choice import choose_tokenizer
from fira.devices import choose_devices
from fira.models.language_model import LanguageModel
from fira.models.quantized_model import describe_size


def load(path: str | Path, tokenizer: str | None, quantize: str | None, quiet: bool) -> LanguageModel:
    """Load a model on the first GPU or the CPU, or quantised on the CPU; then its size is printed to stderr.

    tokenizer, quantize: see `load_model`. quiet: do not print the size.
    """
    device = choose_devices("cpu" if quantize else "auto", None, 0)[0]
    model = load_model(path, device, choose_tokenizer(tokenizer), quantize)
    if quantize and not quiet:
        print(describe_size(model), file=sys.stderr)
    return model
