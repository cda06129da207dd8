"""From a checkpoint's folder to a model that can be used."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from fira.checkpoint.pretrained import open_saved
from fira.data.tokenizer import TOKENIZER
from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.registry import build, from_document


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model, in eval mode and with its tokenizer, of a run folder, a checkpoints folder, a step folder, or a folder
    of transformers (an export, a Llama, a FlexOlmo).

    Any layout may have written it. `model.tokenizer` is None where it was trained on shards without one.
    Raises UserError where there is no checkpoint, or one that is damaged or of another model.
    """
    saved = open_saved(path)
    with torch.device("meta"):
        model = build(from_document(saved.document("config")))
    for name, tensor in model.weights().items():
        if saved.shape(name) != tuple(tensor.shape):
            raise UserError(f"{saved.folder}: {name} is {saved.shape(name)}, its config.json says {tensor.shape}")
    weights = {name: saved.read(name) for name in model.weights()}
    model.load_state_dict(weights, strict=not model.tied, assign=True)
    model.tie()
    if saved.has_file(TOKENIZER):
        model.tokenizer = Tokenizer.from_buffer(saved.file(TOKENIZER))
    return model.to(device).eval()


def own_tokenizer(model: LanguageModel) -> Tokenizer:
    """The tokenizer that came with a model; UserError where none did."""
    if model.tokenizer is None:
        raise UserError("the model came without a tokenizer; give that of its data")
    return model.tokenizer
