"""The transformers models have the logits of our models and support caches, beams, padding, losses and saving."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fira.huggingface import FiraLMConfig, FiraLMForCausalLM, RishAICausalLM, RishAIConfig, RishAIModel
from fira.models.language_model import LanguageModel
from fira.models.registry import FAMILIES, PRESETS, build, to_document
from fira.nn.context import Context
from tests.torch_versions import needs_fsdp2_on_cpus

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def small(family: str) -> Any:
    """A small config, with an attention window shorter than the test sequences."""
    config = replace(PRESETS[f"{family}-tiny"], vocab_size=64, seq_len=40, d_model=32, num_layers=2)
    if family == "blues":
        return replace(config, softcap=3.0, qk_norm=True, value_embeddings=True, residual_scalars=True)
    return replace(config, window=6) if family == "microrwkv" else config


def trained(config: Any) -> LanguageModel:
    """A model in eval mode whose parameters are all different from their initial values, such as zero."""
    model = build(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def wrapped(family: str) -> tuple[LanguageModel, FiraLMForCausalLM]:
    """A model, and the transformers model with the same weights."""
    ours = trained(small(family))
    causal, config = (RishAICausalLM, RishAIConfig) if family == "rish" else (FiraLMForCausalLM, FiraLMConfig)
    theirs = causal(config(shape=to_document(ours.config))).eval()
    theirs.load_state_dict({f"model.{name}": value for name, value in ours.state_dict().items()})
    return ours, theirs


families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_new_model_has_the_initial_values_of_training(family: str) -> None:
    config = small(family)
    model = FiraLMForCausalLM(FiraLMConfig(shape=to_document(config)))
    for name, value in build(config).weights().items():
        assert torch.equal(model.state_dict()[f"model.{name}"], value), name


@families
@torch.no_grad()
def test_logits_cache_beams_and_padding(family: str) -> None:
    ours, model = wrapped(family)
    expected = ours(IDS, Context())
    assert torch.equal(model(IDS).logits, expected)
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected[:, -1:])
    vectors = model.get_input_embeddings()(IDS)
    if getattr(ours.config, "value_embeddings", False):
        with pytest.raises(ValueError, match="give input_ids"):
            model(inputs_embeds=vectors)
        with pytest.raises(ValueError, match="cannot be resized"):
            model.resize_token_embeddings(70)
    else:
        assert torch.equal(model(inputs_embeds=vectors).logits, expected)

    first = model(IDS[:, :5])
    then = model(IDS[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, expected[:, 5:], rtol=1e-5, atol=1e-5)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cached, uncached = (model.generate(IDS, **GREEDY, **options, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, uncached), options
        assert len({*cached[:, 9:].flatten().tolist()}) > 1

    short = IDS[:1, :5]
    batch = torch.cat([torch.cat([torch.full((1, 4), 7), short], 1), IDS[1:]])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    padded, alone = model(batch, attention_mask=mask).logits, model(short).logits
    torch.testing.assert_close(padded[:1, 4:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[1:], expected[1:], rtol=1e-5, atol=1e-5)
    padded, alone = model.generate(batch, attention_mask=mask, **GREEDY), model.generate(short, **GREEDY)
    assert torch.equal(padded[0, 9:], alone[0, 5:])
    with pytest.raises(ValueError, match="zero between ones"):
        model(IDS, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]] * 2))


@families
@torch.no_grad()
def test_speculative_decoding_equals_greedy_search(family: str) -> None:
    _, model = wrapped(family)
    draft = FiraLMForCausalLM(FiraLMConfig(shape=to_document(small(family)))).eval()
    if family == "microrwkv":  # tokens cannot be removed from a recurrent state
        with pytest.raises(ValueError, match="stateful"):
            model.generate(IDS[:1], assistant_model=draft, **GREEDY)
    else:
        assert torch.equal(model.generate(IDS[:1], assistant_model=draft, **GREEDY), model.generate(IDS[:1], **GREEDY))


@families
def test_outputs_and_loss_with_and_without_gradient_checkpointing(family: str) -> None:
    _, model = wrapped(family)
    logits = model(IDS).logits
    outputs = model(IDS, labels=IDS, output_attentions=True, output_hidden_states=True, output_router_logits=True)
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-5, atol=1e-5)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert outputs.loss.item() == pytest.approx(nll.item(), rel=1e-5)
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == (4 if family == "microrwkv" else 2)
    for attention in outputs.attentions:
        assert attention.shape[-2:] == (9, 9)
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    experts = 0 if family == "mooshak" else 2
    assert [routed.shape[0] for routed in outputs.router_logits] == [18] * experts

    model.train()
    gradients: list[list[Tensor]] = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)  # determines dropout and noise
        outputs = model(IDS, labels=IDS)
        outputs.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))
    assert (outputs.aux_loss is None) == (family == "mooshak")
    if outputs.aux_loss is not None and family != "blues":  # its routing noise changes the loss
        assert outputs.loss.item() == pytest.approx(nll.item() + outputs.aux_loss.item(), rel=1e-5)


@families
def test_loss_of_shifted_labels(family: str) -> None:
    """DeepSpeed with sequence parallelism gives the next tokens as both arguments, Trainer as one of them."""
    _, model = wrapped(family)
    labels = IDS.where(IDS % 5 != 0, -100)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    count = int((shifted != -100).sum())

    def loss(**arguments: Any) -> float:
        torch.manual_seed(0)
        return model.train()(IDS, num_items_in_batch=2 * count, **arguments).loss.item()

    expected = loss(labels=labels)
    assert loss(labels=labels, shift_labels=shifted) == expected
    assert loss(labels=shifted, shift_labels=shifted) == expected


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_fsdp2_on_cpus
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.05)])
def test_auxiliary_losses_of_blocks_that_fsdp2_shards(one_rank: None, dtype: torch.dtype | None, tolerance: float):
    """FSDP2 copies dataclasses among the arguments of a block, and converts their tensors."""
    _, model = wrapped("fira")
    expected = model.train()(IDS, labels=IDS)
    for block in model.model.layers[1:-1]:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32))
    outputs = model(IDS, labels=IDS)
    assert outputs.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=tolerance)
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)


@families
def test_saved_model_is_loaded_by_auto_classes(family: str, tmp_path: Path) -> None:
    ours, model = wrapped(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).own() == ours.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    difference = (half(IDS).logits.float() - ours(IDS, Context())).abs()
    assert difference.median() < 0.03  # not the maximum: rounding can change the chosen experts of a token
    base = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(IDS).last_hidden_state, model(IDS, output_hidden_states=True).hidden_states[-1])
    if getattr(ours.config, "value_embeddings", False):
        return  # these tables are not resized
    base.resize_token_embeddings(70, mean_resizing=False)
    assert base.get_input_embeddings().weight.shape[0] == 70
    loaded.resize_token_embeddings(70)
    assert loaded(IDS).logits.shape[-1] == loaded.config.vocab_size == 70
    torch.testing.assert_close(loaded(IDS).logits[..., :64], model(IDS).logits)


def test_rish_config_accepts_names_of_transformers() -> None:
    config = RishAIConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_experts=7,
        num_experts_per_tok=5,
    )
    assert config.own() == replace(
        PRESETS["rish-base"],
        vocab_size=99,
        d_model=32,
        d_ff=37,
        num_layers=2,
        n_head=4,
        n_kv_head=2,
        seq_len=64,
        max_position=64,
        num_experts=7,
        top_k=5,
    )
    scaled = RishAIConfig(max_position_embeddings=64, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 4.0})
    for scaled_config in (scaled, RishAIConfig.from_dict(scaled.to_dict())):
        own = scaled_config.own()
        assert (own.max_position, own.seq_len, own.rope_factor, own.rope_theta) == (64, 256, 4.0, 1e4)
        assert scaled_config.rope_scaling == {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    for factor in (None, 0.5, -4.0, math.nan, "4"):
        with pytest.raises(ValueError, match=f"rope factor {factor!r}: give a number of at least 1"):
            RishAIConfig(rope_scaling={"type": "dynamic", "factor": factor})
    with pytest.raises(ValueError, match="rope_type 'yarn': give 'default' or 'dynamic'"):
        RishAIConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert RishAIModel(config)(IDS).last_hidden_state.shape == (2, 9, 32)
    assert RishAICausalLM(config).generate(IDS[:1], max_length=12).shape == (1, 12)
    with pytest.raises(AttributeError, match="mooshak has no num_experts"):
        FiraLMConfig(shape={"family": "mooshak"}, num_experts=3)


def test_flash_attention_is_refused_only_because_its_package_is_missing() -> None:
    config = RishAIConfig(shape=to_document(small("rish")))
    with pytest.raises(ImportError, match=r"kernels|FlashAttention2"):  # transformers looks for both packages
        AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2")
