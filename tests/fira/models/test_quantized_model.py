"""Models of all families with quantised matrices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fira.errors import UserError
from fira.generation.beams import beam_search
from fira.models.language_model import LanguageModel
from fira.models.quantized_model import describe_size, quantize_matrices
from fira.models.registry import build
from fira.nn.context import Context
from fira.nn.quantization import FORMS, Quantization
from tests import reference_models as reference
from tests.fira.models.small_families import CONFIGS, SMALL, families, make_model, make_tokens

CASES = [(name, form) for name in CONFIGS for form in FORMS if "+" not in form or not build(CONFIGS[name]).tied]


def quantized(model: LanguageModel, form: str) -> LanguageModel:
    weights = model.weights()
    with torch.device("meta"):
        copy = build(model.config)

    def read(name: str, shape: tuple[int, ...], start: int, stop: int | None) -> Tensor:
        assert tuple(weights[name].shape) == shape
        return weights[name].detach()[start:stop]

    quantize_matrices(copy, Quantization.parse(form), read)
    missing = {name: weights[name] for name, tensor in copy.weights().items() if tensor.is_meta}
    copy.load_state_dict(missing, strict=not copy.tied, assign=True)
    copy.tie()
    return copy.eval()


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def in_8_bits(weight: Tensor) -> Tensor:
    scale = bf16(weight.abs().amax(-1, keepdim=True) / 127)
    return (weight / scale).round().clamp(-127, 127) * scale


def in_4_bits(weight: Tensor) -> Tensor:
    """Groups of 32, of which the last one of a row is filled with zeros."""
    width = weight.shape[-1]
    groups = torch.nn.functional.pad(weight, (0, -width % 32)).unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = bf16((high - low) / 15)
    middle = bf16(low + 8 * scale)
    return (((groups - middle) / scale).round().clamp(-8, 7) * scale + middle).flatten(-2)[..., :width]


def rounded(name: str, weight: Tensor, form: str, last: str) -> Tensor:
    """A parameter as the quantised model has it: router, norms, embeddings and biases are unchanged."""
    kept = ("gate.", "norm", "token", "position", "table", "maa", "decay", "bonus")
    if weight.dim() < 2 or any(part in name for part in kept) or name.endswith((".b1", ".b2")):
        return weight
    if name.startswith(f"{last}."):
        return in_8_bits(weight) if "+head" in form else weight
    return in_8_bits(weight) if form.startswith("int8") else in_4_bits(weight)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_logits_are_those_of_the_rounded_weights(name: str, form: str) -> None:
    """Against independent models. The tolerance allows for inputs and outputs of products in bf16."""
    config = (
        replace(CONFIGS[name], top_k=CONFIGS[name].num_experts) if hasattr(CONFIGS[name], "top_k") else CONFIGS[name]
    )
    model, tokens = make_model(config, torch.float32), make_tokens(config)
    last = f"layers.{config.num_layers + 1}"
    results = []
    for values in (form, "none"):
        p = {key: value.detach() for key, value in model.named_parameters()}
        if values == form:
            p = {key: rounded(key, value, form, last) for key, value in p.items()}
        p = {key: value.double() for key, value in p.items()}
        family = reference.FAMILIES[name.partition("-")[0]]
        results.append(torch.stack([family(sequence, p, config)[0] for sequence in tokens]))
    expected, full = results
    with torch.no_grad():
        logits = quantized(model, form)(tokens, Context()).double()
    distance, change = (logits - expected).norm(), (full - expected).norm()
    assert distance < 0.015 * expected.norm()
    assert distance < (0.7 if form.startswith("int8") else 0.1) * change


@families
@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(name: str) -> None:
    model = quantized(make_model(CONFIGS[name], torch.float32), "int8")
    tokens = make_tokens(CONFIGS[name], batch=1)
    both = [model.generate(tokens, 6, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*both)


@families
def test_matrices_are_smaller_and_all_other_weights_unchanged(name: str) -> None:
    full = make_model(CONFIGS[name], torch.float32)
    model = quantized(full, "int4")
    matrices = {key for key, _ in full.named_parameters()} - {key for key, _ in model.named_parameters()}
    kept = ("router", "norm", "token", "position", "table", f"layers.{len(full.layers) - 1}.")
    expected = {key for key, value in full.named_parameters() if value.dim() > 1 and not any(k in key for k in kept)}
    assert matrices == {key for key in expected if not key.endswith((".b1", ".b2"))}
    for key, value in model.named_parameters():
        assert torch.equal(value, full.get_parameter(key))
    assert describe_size(model).startswith("int4: weights of 0.")
    assert model.layers[-1].project.weight.dtype == torch.float32


def test_head_that_is_tied_is_not_quantised() -> None:
    with pytest.raises(UserError, match=r"int8\+head: the head of this blues shares its weight"):
        quantized(make_model(CONFIGS["blues"]), "int8+head")
    with pytest.raises(UserError, match="no quantisation 'int3'"):
        Quantization.parse("int3")


def test_beam_search_with_a_quantised_model() -> None:
    model = quantized(make_model(CONFIGS["mooshak"], torch.float32), "int8+head")
    prompt: list[int] = make_tokens(model.config, batch=1)[0].tolist()
    assert (
        beam_search(model, prompt, 5, 1, eos=SMALL["vocab_size"]) == model.generate([prompt], 5, temperature=0)[0][12:]
    )
