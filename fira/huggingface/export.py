"""A trained model as a folder that a stock transformers loads, without this package."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fira.checkpoint.load_model import load_model
from fira.checkpoint.transformers_mapping import TRANSFORMERS, to_transformers, weight_names
from fira.data.tokenizer import ASSISTANT, CHAT_TEMPLATE, PROMPTER, eos_id
from fira.errors import UserError
from fira.files import errors_naming
from fira.huggingface import FiraLMConfig, FiraLMForCausalLM, RishAICausalLM, RishAIConfig
from fira.models.language_model import LanguageModel
from fira.models.registry import family_of, to_document

FORMATS = ("fira", *TRANSFORMERS)
SHARD = "5GB"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer's matter, not the model's


def export(checkpoint: str | Path, out: str | Path, form: str = "fira") -> Path:
    """Write the model of a checkpoint (see `load_model`) into a new folder; returns it.

    form: "fira" takes the models' own files along, for `trust_remote_code=True`; "llama" (of a mooshak) and "flexolmo"
    (of a rish) give a model of that class of transformers, which computes the same.
    UserError where the folder is not empty, or the model's options have no equal in that class.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.tmp")
    for place in (out, partial):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{place} is not empty; choose a new folder as --out")
    model = load_model(checkpoint)
    made = as_transformers(model) if form == "fira" else as_stock(model, form)
    made.generation_config = GenerationConfig(max_new_tokens=model.config.seq_len // 2)  # as much again as is read
    try:
        with errors_naming(partial):
            if model.tokenizer is not None:
                tokenizer = as_fast_tokenizer(model.tokenizer, model.config.seq_len)
                made.generation_config.eos_token_id = made.generation_config.pad_token_id = tokenizer.eos_token_id
                tokenizer.save_pretrained(partial)
            made.save_pretrained(partial, max_shard_size=SHARD)
            for path in partial.iterdir():
                path.chmod(0o666 & partial.stat().st_mode)  # safetensors makes files that only their owner can read
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def as_transformers(model: LanguageModel) -> FiraLMForCausalLM:
    """The same model as one of transformers'; they share their weights."""
    causal, config = (
        (RishAICausalLM, RishAIConfig)
        if family_of(model.config).name == RishAIConfig.family
        else (FiraLMForCausalLM, FiraLMConfig)
    )
    with torch.device("meta"):
        made = causal(config(shape=to_document(model.config)))
    return _fill(made, {f"model.{name}": value for name, value in model.weights().items()})


def as_stock(model: LanguageModel, form: str) -> PreTrainedModel:
    """The same function in a class of transformers' own, sharing the weights. UserError where there is none."""
    values = to_transformers(model.config, form)
    architecture = getattr(transformers, TRANSFORMERS[form].architecture)
    with torch.device("meta"):
        made = architecture(architecture.config_class(**values, **dict.fromkeys(ENDS)))
    weights = model.weights()
    return _fill(made, {theirs: weights[ours] for ours, theirs in weight_names(model.config, form).items()})


def _fill(made: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model on the meta device with its weights put in."""
    missing, unexpected = made.load_state_dict(weights, strict=False, assign=True)
    made.tie_weights()
    if unexpected or set(missing) - set(made.all_tied_weights_keys):
        raise ValueError(f"{type(made).__name__} and the weights do not match: {missing}, {unexpected}")
    return made.eval()


def as_fast_tokenizer(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers', padding on the left, with a chat template where it has the tokens for one."""
    known = {"bos_token": "<s>", "unk_token": "[UNK]"}
    known = {name: token for name, token in known.items() if tokenizer.token_to_id(token) is not None}
    ending = tokenizer.id_to_token(eos_id(tokenizer))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=ending,
        pad_token=ending,
        **known,
        padding_side="left",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    if all(tokenizer.token_to_id(token) is not None for token in (PROMPTER, ASSISTANT)):
        made.chat_template = CHAT_TEMPLATE
    return made
