"""Export to a GGUF file, which llama.cpp and the programs built on it run without Python.

    checkpoint  →  read one tensor in fp32  →  convert to F32, F16, Q8_0 or Q4_0  →  append to the file

At no time is more than one layer in memory.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from fira.checkpoint.load_model import saved_config
from fira.checkpoint.pretrained import open_saved, stored_config
from fira.data.tokenizer import TOKENIZER, parse_tokenizer
from fira.errors import UserError
from fira.files import sync
from fira.huggingface.gguf_tensors import EMBEDDING, HEAD, ROUTER, GgufTensor, architecture_of, gguf_tensors
from fira.huggingface.gguf_tokenizer import add_tokenizer
from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.nn.moe.router import number_chosen
from fira.progress_bar import progress_bar


class FileType(NamedTuple):
    """Types of the tensors of a file. Norms and routers are always in F32.

    general: the value of general.file_type. blocks: type of the matrices of the blocks. ends: of embedding and head.
    """

    general: LlamaFileType
    blocks: GGMLQuantizationType
    ends: GGMLQuantizationType


F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
Q8_0, Q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0
FILE_TYPES = {
    "f16": FileType(LlamaFileType.MOSTLY_F16, F16, F16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Q8_0, Q8_0),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Q4_0, Q8_0),  # llama.cpp, too, stores embedding and head with more bits
}


def save_gguf(checkpoint: str | Path, path: Path, kind: str, progress: bool = False) -> LanguageModel:
    """Write the model of a checkpoint (see `open_saved`) to the file `path`. Return it on the meta device.

    kind: a key of FILE_TYPES. progress: show a progress bar. Raises UserError, before anything is written, if llama.cpp
    has no equivalent of the model or its tokenizer, or if `kind` needs other widths.
    """
    saved = open_saved(checkpoint)
    config = stored_config(saved)
    writer = GGUFWriter(path, architecture_of(config))
    _check_widths(config, kind)
    if not saved.has_file(TOKENIZER):
        raise UserError(f"--format gguf: {saved.folder} has no {TOKENIZER}; export to a format of transformers")
    tokenizer = parse_tokenizer(saved.file(TOKENIZER), saved.folder / TOKENIZER)
    _add_settings(writer, config, FILE_TYPES[kind])
    writer.add_name(path.stem)
    add_tokenizer(writer, tokenizer, saved_config(saved, tokenizer), config.vocab_size)
    with torch.device("meta"):
        model = build(config)
    tensors = [(tensor, _type_of(tensor, FILE_TYPES[kind])) for tensor in gguf_tensors(model)]
    for tensor, dtype in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor, dtype), dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(model.num_parameters(), "export", progress, " weights") as bar:
            for tensor, dtype in tensors:
                writer.write_tensor_data(_convert(tensor.read(saved).numpy(), tensor.name, dtype))
                bar.update(math.prod(tensor.shape))
    finally:
        writer.close()
    sync(path)
    return model


def _check_widths(config: Any, kind: str) -> None:
    """Raise UserError if the rows of a matrix are not a multiple of the block of a quantised type."""
    block = max(GGML_QUANT_SIZES[dtype][0] for dtype in FILE_TYPES[kind][1:])
    widths = {"d_model": config.d_model, "d_ff": config.d_ff}
    if any(width % block for width in widths.values()):
        fitting = ",".join(f"{name}={math.ceil(w / block) * block}" for name, w in widths.items() if w % block)
        given = " and ".join(f"{name} {w}" for name, w in widths.items() if w % block)
        raise UserError(
            f"--type {kind}: {given} must be a multiple of {block}; train with --model-set {fitting}, or use --type f16"
        )


def _add_settings(writer: GGUFWriter, config: Any, types: FileType) -> None:
    """Write the hyperparameters."""
    writer.add_type("model")
    writer.add_file_type(types.general)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head or config.n_head)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.d_model // config.n_head)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(number_chosen(config.top_k, config.num_experts))


def _type_of(tensor: GgufTensor, types: FileType) -> GGMLQuantizationType:
    if len(tensor.shape) == 1 or tensor.name.endswith(ROUTER):
        return F32
    return types.ends if tensor.name in (EMBEDDING, HEAD) else types.blocks


def _bytes(tensor: GgufTensor, dtype: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[dtype]
    return math.prod(tensor.shape) // block * size


def _convert(values: np.ndarray, name: str, dtype: GGMLQuantizationType) -> np.ndarray:
    """fp32 → an array with the bytes of a type. Raises UserError for values, or scales of blocks, beyond fp16."""
    with np.errstate(over="ignore"):
        converted = quantize(values, dtype)
    largest = np.abs(values).max() / {F16: 1, Q8_0: 127, Q4_0: 8}.get(dtype, math.inf)
    if not largest < 65520:
        raise UserError(f"{name}: a value of {np.abs(values).max():.3g} is beyond fp16; use --format fira")
    return converted
