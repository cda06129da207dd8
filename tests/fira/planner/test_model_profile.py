"""The profile of a model, and the memory that its layers' backward needs."""

import pytest
import torch

from fira.models.registry import build, make_config
from fira.nn.context import Context, TrainingContext
from fira.nn.cross_entropy import LOGITS
from fira.planner.model_profile import logits_bytes, profile_of, saved_bytes


def test_profile_of_tiny(tiny):
    assert tiny.layers == [0, 1, 1, 1, 1, 2]
    assert (tiny.tokens, tiny.width, tiny.num_experts) == (tiny.config.seq_len, tiny.config.d_model, 4)
    embedding, block, head = tiny.kinds
    assert embedding.expert_parameters == head.expert_parameters == embedding.moe_layers == 0
    experts = {name: p for name, p in block.layer.named_parameters() if ".experts." in f".{name}"}
    assert block.expert_parameters == sum(p.numel() for p in experts.values())
    assert block.parameters == sum(p.numel() for p in block.layer.parameters()) - block.expert_parameters
    assert (block.moe_layers, block.top_k) == (1, tiny.config.top_k)
    assert block.largest == max(p.numel() for p in block.layer.parameters())


def test_copies_of_weights_for_autocast_are_not_saved_per_micro_batch(tiny):
    """Under autocast a block saves about half of the bytes; its copies of weights are larger than these."""
    single, double = (saved_bytes(tiny, 1, size, torch.bfloat16)[0] for size in (1, 2))
    assert single == pytest.approx(double - single, rel=0.02)  # no part that does not depend on the micro-batch
    assert 0 < single < saved_bytes(tiny, 1, 1)[0]


@pytest.mark.parametrize("family", ["fira", "rish", "blues"])
def test_saved_bytes_equal_those_of_torch(family):
    model = build(make_config(f"{family}-tiny", {}))
    with torch.device("meta"):
        profile = profile_of(build(model.config))
    tokens = torch.randint(profile.config.vocab_size, (2, profile.tokens))
    x = tokens
    for index in range(len(model.layers)):
        context = Context(torch.full((2,), profile.tokens), keys=torch.arange(2), tokens=tokens)
        context.training = TrainingContext(tokens, aux_weights=torch.ones(2))
        saved: dict[int, torch.Tensor] = {}
        x = x.detach().requires_grad_(x.is_floating_point())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            x = model.layers[index](x, context)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        expected = sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in parameters)
        for_backward, for_weight_grad = saved_bytes(profile, profile.layers[index], 2)
        assert for_backward == pytest.approx(expected, rel=0.02)
        assert (0 < for_weight_grad < expected) == (index > 0)  # tokens have no gradient


def test_logits_bytes_are_limited_by_the_tokens_processed_at_a_time(tiny):
    vocab_size = tiny.config.vocab_size
    assert logits_bytes(tiny, 1, "cpu") == 12 * min(128, max(256, LOGITS["cpu"] // vocab_size)) * vocab_size
    assert logits_bytes(tiny, 10**6, "cpu") == 12 * max(256, LOGITS["cpu"] // vocab_size) * vocab_size
