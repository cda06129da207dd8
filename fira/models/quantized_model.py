"""Quantise the matrices of a model while it is loaded, one after another."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.registry import build, family_of
from fira.nn.embedding import Head
from fira.nn.moe.experts import ExpertBank
from fira.nn.moe.quantized_experts import QuantizedExperts
from fira.nn.quantization import Quantization
from fira.nn.quantized_linear import QuantizedHead, QuantizedLinear
from fira.nn.quantized_matrix import Int4Matrix, Int8Matrix
from fira.nn.row_linear import RowLinear

# (global name of a weight, its shape, first row, end of the rows or None) → its rows
ReadRows = Callable[[str, tuple[int, ...], int, int | None], Tensor]


def quantize_matrices(model: LanguageModel, quantization: Quantization, read: ReadRows) -> None:
    """Replace the matrices of a model on the meta device by quantised ones, in place.

    These are the matrices of attention, time mixing and experts, and of the head if it is chosen. At most one matrix,
    or one expert's, is in memory in full precision. Raises UserError if the head is chosen and shares its weight with
    the embedding.
    """
    if model.tied and quantization.head:
        name = family_of(model.config).name
        raise UserError(f"{quantization}: the head of this {name} shares its weight with the embedding; omit +head")
    model.quantization = quantization
    form = {8: Int8Matrix, 4: Int4Matrix}[quantization.bits]
    for path, module in list(model.named_modules()):
        if isinstance(module, ExpertBank):
            for name in module.matrices():
                experts = QuantizedExperts([form(weight) for weight in _each_expert(module, path, name, read)])
                delattr(module, name)
                setattr(module, name, experts)
        elif isinstance(module, Head) and not quantization.head:
            module.project = RowLinear(module.project)
        elif getattr(module, "lora_target", None) is not None:  # attention, time mixing, feed-forward layers, head
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    weight = read(f"{path}.{name}.weight", tuple(child.weight.shape), 0, None)
                    head = isinstance(module, Head)
                    linear = QuantizedHead(child, Int8Matrix(weight)) if head else QuantizedLinear(child, form(weight))
                    setattr(module, name, linear)


def _each_expert(bank: ExpertBank, path: str, name: str, read: ReadRows) -> Iterator[Tensor]:
    """Read the weight [out, in] of one expert after another."""
    shape = tuple(bank.get_parameter(name).shape)
    for expert in range(shape[0]):
        yield read(f"{path}.{name}", shape, expert, expert + 1)[0]


def describe_size(model: LanguageModel) -> str:
    """Return one line about the size of the weights of a quantised model, compared with fp32."""
    size = sum(weight.nbytes for weight in model.weights().values())
    with torch.device("meta"):
        full = 4 * build(model.config).num_parameters()
    return f"{model.quantization}: weights of {size / 1e6:,.1f} MB, in fp32 {full / 1e6:,.1f} MB ({size / full:.0%})"
