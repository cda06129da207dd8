"""Load a model for inference from a checkpoint or an exported folder."""

import hashlib
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fira.checkpoint.manifest import combined_hash
from fira.checkpoint.pretrained import Saved, open_saved, read_weight, stored_config
from fira.data.cache import cache_folder, cached
from fira.data.tokenizer import TOKENIZER, load_tokenizer, parse_tokenizer
from fira.data.tokenizer_config import (
    TOKENIZER_CONFIG,
    TokenizerConfig,
    default_config,
    read_config,
    read_config_beside,
)
from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.quantized_model import quantize_matrices
from fira.models.registry import build
from fira.nn.quantization import Quantization


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Load a model in eval mode.

    path: a run folder, a checkpoints folder, a step folder (written by any layout), a folder of transformers (an
    export, a Llama, FlexOlmo or OLMoE), or a safetensors file with its config in the metadata or next to it.
    tokenizer: the path of a tokenizer.json; by default the model's own is loaded as `model.tokenizer`, which is None if
    the model was trained on shards without a tokenizer. Its special tokens and chat template, from the files next to
    it, become `model.tokenizer_config`.
    quantize: one of `fira.nn.quantization.FORMS`, such as "int8": the matrices of the blocks are quantised while they
    are read, for inference on the CPU; None: all weights have their stored precision.

    Raises UserError if there is no checkpoint, or if it is damaged or does not match its config.
    """
    quantization = None if quantize is None else Quantization.parse(quantize)
    if quantization and torch.device(device).type != "cpu":
        raise UserError(f"{quantization} is for CPUs; load the model on the CPU, or without quantisation")
    saved = open_saved(path)
    with torch.device("meta"):
        model = build(stored_config(saved))
    if quantization:
        quantize_matrices(model, quantization, partial(_read_finite, saved))
    missing = {name: tensor for name, tensor in model.weights().items() if tensor.is_meta}
    weights = {name: read_weight(saved, name, tuple(tensor.shape)) for name, tensor in missing.items()}
    model.load_state_dict(weights, strict=not model.tied, assign=True)
    model.tie()
    if tokenizer is not None:
        model.tokenizer = load_tokenizer(tokenizer)
        model.tokenizer_config = read_config_beside(model.tokenizer, Path(tokenizer))
    elif saved.has_file(TOKENIZER):
        model.tokenizer = parse_tokenizer(saved.file(TOKENIZER), saved.folder / TOKENIZER)
        model.tokenizer_config = saved_config(saved, model.tokenizer)
    return model.to(device).eval()


def _read_finite(saved: Saved, name: str, shape: tuple[int, ...], start: int, stop: int | None) -> Tensor:
    """Read rows of a weight. Raises UserError if a value is infinite or NaN."""
    weight = read_weight(saved, name, shape, start, stop)
    if not torch.stack(weight.aminmax()).isfinite().all():  # NaN is both; isfinite would need a copy
        raise UserError(f"{saved.folder}: {name} has values that are not finite, which cannot be quantised; restore it")
    return weight


def own_tokenizer(model: LanguageModel) -> Tokenizer:
    """Return the model's tokenizer. Raises UserError if it has none."""
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer; give the --tokenizer of its training data")
    return model.tokenizer


def own_config(model: LanguageModel) -> TokenizerConfig:
    """Return the special tokens and the chat template of a model. Raises UserError if it has no tokenizer."""
    tokenizer = own_tokenizer(model)
    return model.tokenizer_config or default_config(tokenizer)


def saved_tokenizer(saved: Saved) -> str | None:
    """Return the path of a saved model's tokenizer.json, in the cache if it is in metadata; None if it has none."""
    if not saved.has_file(TOKENIZER):
        return None
    if (saved.folder / TOKENIZER).is_file():
        return str(saved.folder / TOKENIZER)
    files = {name: saved.file(name) for name in (TOKENIZER, TOKENIZER_CONFIG) if saved.has_file(name)}
    key = combined_hash({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return str(cached(cache_folder(), key, False, write) / TOKENIZER)


def saved_config(saved: Saved, tokenizer: Tokenizer) -> TokenizerConfig:
    """Return the special tokens and the chat template of a saved model, whose tokenizer this is."""
    return read_config(tokenizer, saved.folder, lambda name: saved.file(name) if saved.has_file(name) else None)
