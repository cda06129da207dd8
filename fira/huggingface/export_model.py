"""Export of a trained model to a folder that transformers loads without this package."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fira.checkpoint.load_model import load_model, own_config
from fira.checkpoint.metadata import add_metadata
from fira.checkpoint.pretrained import CONFIG, WEIGHTS
from fira.checkpoint.step_folders import run_of
from fira.checkpoint.transformers_mapping import TRANSFORMERS, to_transformers, weight_names
from fira.data.tokenizer import TOKENIZER
from fira.data.tokenizer_config import TOKENIZER_CONFIG, TokenizerConfig
from fira.errors import UserError
from fira.files import errors_naming
from fira.huggingface import FiraLMConfig, FiraLMForCausalLM, RishAICausalLM, RishAIConfig
from fira.huggingface.model_card import write_model_card
from fira.huggingface.peft_export import save_adapters
from fira.models.language_model import LanguageModel
from fira.models.registry import family_of, to_document

SHARD = "5GB"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # left to the tokenizer


def export(
    checkpoint: str | Path, out: str | Path, form: str = "fira", kind: str = "f16", progress: bool = False
) -> Path:
    """Write the model of a checkpoint (see `load_model`) and a model card to the new folder `out`; return the folder.

    form: "fira" includes the source code of the model, for `trust_remote_code=True`. "llama" (for mooshak),
    "flexolmo" and "olmoe" (for rish) export to that class of transformers, which computes the same function. "peft"
    writes the adapters of a LoRA run instead of a model. "gguf" (for mooshak, and rish with the norms of OLMoE) writes
    the file `gguf_path(out, kind)`, with tensors of the type `kind`, and shows a progress bar if `progress`.

    Raises UserError if the folder is not empty, or if that class has no equivalent of one of the model's options.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.tmp")
    for folder in (out, partial):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty; choose a new folder as --out")
    try:
        with errors_naming(partial):
            if form == "peft":
                save_adapters(checkpoint, partial)
            elif form == "gguf":
                model = _save_gguf(checkpoint, partial / gguf_path(out, kind).name, kind, progress)
                write_model_card(partial, model, out.name, run_of(checkpoint), library="gguf")
            else:
                model = load_model(checkpoint)
                _save_model(model, partial, form)
                write_model_card(partial, model, out.name, run_of(checkpoint))
            for path in partial.iterdir():
                path.chmod(0o666 & partial.stat().st_mode)  # safetensors creates files that only their owner can read
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def gguf_path(out: Path, kind: str) -> Path:
    """Return the file of an export in the format gguf, named as llama.cpp does: `out/out-Q8_0.gguf`."""
    return out / f"{out.name}-{kind.upper()}.gguf"


def _save_gguf(checkpoint: str | Path, path: Path, kind: str, progress: bool) -> LanguageModel:
    """`save_gguf`. Raises UserError if the package gguf is not installed."""
    try:
        from fira.huggingface.gguf_export import save_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UserError("--format gguf needs the package gguf; pip install -e '.[gguf]'") from None
    return save_gguf(checkpoint, path, kind, progress)


def _save_model(model: LanguageModel, folder: Path, form: str) -> None:
    """Write a model and its tokenizer, if it has one."""
    exported = as_transformers(model) if form == "fira" else as_stock(model, form)
    exported.generation_config = GenerationConfig(max_length=model.config.seq_len)
    if model.tokenizer is not None:
        tokenizer = as_fast_tokenizer(model.tokenizer, own_config(model), model.config.seq_len)
        generation = exported.generation_config
        generation.eos_token_id = generation.pad_token_id = tokenizer.eos_token_id
        tokenizer.save_pretrained(folder)
    exported.save_pretrained(folder, max_shard_size=SHARD)
    if (folder / WEIGHTS).is_file():
        add_metadata(folder / WEIGHTS, _texts(folder, model))


def _texts(folder: Path, model: LanguageModel) -> dict[str, str]:
    """The files that a file of weights needs to be used without its folder, as texts by name."""
    texts = {CONFIG: (folder / CONFIG).read_text(encoding="utf-8")}
    if model.tokenizer is not None:
        texts |= {TOKENIZER: model.tokenizer.to_str(), TOKENIZER_CONFIG: own_config(model).to_json().decode()}
    return texts


def as_transformers(model: LanguageModel) -> FiraLMForCausalLM:
    """Wrap a model in the transformers class of this package, sharing the weights."""
    causal, config = (
        (RishAICausalLM, RishAIConfig)
        if family_of(model.config).name == RishAIConfig.family
        else (FiraLMForCausalLM, FiraLMConfig)
    )
    with torch.device("meta"):
        wrapped = causal(config(shape=to_document(model.config)))
    if model.quantization:  # the modules are shared, because they differ from those of the class
        wrapped.model.layers = model.layers
        return wrapped.eval()
    return _assign_weights(wrapped, {f"model.{name}": value for name, value in model.weights().items()})


def as_stock(model: LanguageModel, form: str) -> PreTrainedModel:
    """Convert to a model class of transformers, sharing the weights. Raises UserError if there is no equivalent."""
    values = to_transformers(model.config, form)
    architecture = getattr(transformers, TRANSFORMERS[form].architecture)
    with torch.device("meta"):
        converted = architecture(architecture.config_class(**values, **dict.fromkeys(TOKEN_IDS)))
    weights = model.weights()
    names = weight_names(model.config, form)
    return _assign_weights(converted, {theirs: weights[ours] for ours, theirs in names.items()})


def _assign_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Replace the parameters of a transformers model on the meta device by `weights`; return it in eval mode."""
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise ValueError(f"weights do not match {type(model).__name__}: missing {missing}, unexpected {unexpected}")
    return model.eval()


def as_fast_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig, length: int) -> PreTrainedTokenizerFast:
    """Convert a tokenizer to transformers' class, with padding on the left.

    config: its special tokens and chat template. length: longest context of the model.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **config.settings(),
        padding_side="left",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
