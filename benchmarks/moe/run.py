"""MoE layer compared with a dense layer of equal active FLOPs, transformers' Mixtral block and a naive loop.

    python -m benchmarks.moe.run              # all cases
    python -m benchmarks.moe.run 8x2 64x2     # selected cases: experts x top-k

Forward and backward of one layer in fp32 on the CPU, with the same weights. Writes results.csv and results.png.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.measure import alternate, environment, merge, products, ratio
from fira.devices import keep_freed_memory
from fira.nn.context import Context, TrainingContext
from fira.nn.mlp import GatedMLP
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROUNDS = 5
WIDTH, HIDDEN, SEQUENCES, LENGTH = 384, 768, 8, 256
CASES = [(4, 1), (4, 2), (8, 1), (8, 2), (8, 5), (16, 2), (16, 4), (32, 2), (64, 2), (64, 5)]
SKEWED = [(8, 2), (64, 2)]
SLOW_UP_TO = 8  # experts, for contenders that take seconds with more


class NaiveMoE(nn.Module):
    """MoE layer in which every expert computes every token; outputs of experts not chosen are multiplied by zero."""

    def __init__(self, ours: MoE) -> None:
        super().__init__()
        self.router, self.experts = ours.router, ours.experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routed = self.router(flat)
        weights = torch.zeros_like(routed.logits).scatter(1, routed.experts, routed.weights)
        y = torch.zeros_like(flat)
        for e in range(weights.shape[1]):
            gate, a = F.linear(flat, self.experts.w1[e]).chunk(2, dim=-1)
            y = y + weights[:, e, None] * F.linear(F.silu(gate) * a, self.experts.w2[e])
        return y.view_as(x)


def layers(experts: int, top_k: int, skew: float) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[nn.Module]]:
    """Return the contenders and the modules with their weights.

    skew: expert e is chosen with a weight of 1 / (e + 1)^skew, through channel 0, which is one in every token.
    """
    torch.manual_seed(0)
    ours = MoE(
        Router(WIDTH, experts, top_k, bias=False),
        GatedExperts(experts, WIDTH, HIDDEN, F.silu),
        experts,
        1,
        [],
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.02)
        ours.router.gate.weight.normal_(std=WIDTH**-0.5)
        ours.router.gate.weight[:, 0] = -skew * torch.arange(1.0, experts + 1).log()
    shape = {"hidden_size": WIDTH, "intermediate_size": HIDDEN}
    theirs = {}
    for implementation in ("grouped_mm", "eager") if experts <= SLOW_UP_TO else ("grouped_mm",):
        config = MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=top_k)
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config)
        block.gate.weight, block.experts.gate_up_proj = ours.router.gate.weight, ours.experts.w1
        block.experts.down_proj = ours.experts.w2
        theirs[f"Mixtral {implementation}"] = block
    dense = GatedMLP(WIDTH, top_k * HIDDEN, nn.Linear)
    contenders: dict[str, Callable[[Tensor], Tensor]] = {
        "Fira": lambda x: ours(x, Context(training=TrainingContext(aux_weights=torch.ones(SEQUENCES))), None),
        "dense": dense,
        **theirs,
    }
    if experts <= SLOW_UP_TO:
        contenders["naive loop"] = NaiveMoE(ours)
    return contenders, [ours, dense]


def measure(experts: int, top_k: int, skew: float) -> dict[str, object]:
    """Return one row of the results: milliseconds of every contender, ratios, largest load and MFU."""
    contenders, modules = layers(experts, top_k, skew)
    x = torch.randn(SEQUENCES, LENGTH, WIDTH)
    x[..., 0] = 1
    x.requires_grad_()
    gradient = torch.randn_like(x)
    for name, layer in contenders.items():
        if name != "dense":
            torch.testing.assert_close(layer(x), contenders["Fira"](x), rtol=1e-4, atol=1e-5)

    def step(layer: Callable[[Tensor], Tensor]) -> None:
        layer(x).backward(gradient)
        for tensor in [x, *(p for module in modules for p in module.parameters())]:
            tensor.grad = None

    peak, peak_flops = products()
    calls = {name: lambda layer=layer: step(layer) for name, layer in contenders.items()}
    seconds = alternate({**calls, "peak": peak}, ROUNDS)
    flops = 3 * 2 * SEQUENCES * LENGTH * WIDTH * (3 * HIDDEN * top_k + experts)
    best = min((statistics.median(v), name) for name, v in seconds.items() if name.startswith("Mixtral"))[1]
    load = modules[0].router(x.flatten(0, 1)).experts.flatten().bincount(minlength=experts)
    row: dict[str, object] = {
        "experts": experts,
        "top_k": top_k,
        "skew": skew,
        "largest_load": float(load.max() / load.sum() * experts),
        "against_dense": ratio(seconds["dense"], seconds["Fira"]),
        "against_mixtral": ratio(seconds[best], seconds["Fira"]),
        "best_mixtral": best,
        "mfu": flops / peak_flops * ratio(seconds["peak"], seconds["Fira"]),
    }
    return row | {f"{name} ms": 1e3 * statistics.median(v) for name, v in seconds.items() if name != "peak"}


def plot(frame) -> None:
    """Draw the speed relative to the dense layer for each case."""
    names = ["Fira", "Mixtral grouped_mm", "Mixtral eager", "naive loop"]
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    labels = [
        f"{row.experts}, top {row.top_k}" + (f"\nskewed {row.largest_load:.0f}×" if row.skew else "")
        for row in frame.itertuples()
    ]
    for i, name in enumerate(names):
        speed = frame["dense ms"] / frame[f"{name} ms"]
        axes.bar([place + 0.2 * i for place in range(len(frame))], speed, 0.2, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.text(len(frame) - 0.3, 1.01, "dense layer", ha="right", va="bottom")
    axes.axhline(0.9, color="grey", linewidth=1, linestyle=":")
    axes.set_xticks([place + 0.3 for place in range(len(frame))], labels)
    axes.set(xlabel="experts", ylabel="speed, dense layer of equal FLOPs = 1", ylim=(0, 1.4))
    axes.legend(loc="upper center", ncols=4)
    figure.savefig(HERE / "results.png", dpi=110)


def main() -> None:
    keep_freed_memory()
    selected = sys.argv[1:]
    for experts, top_k in CASES:
        if selected and f"{experts}x{top_k}" not in selected:
            continue
        for skew in (0.0, 1.0) if (experts, top_k) in SKEWED else (0.0,):
            row = measure(experts, top_k, skew)
            print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            frame = merge(HERE / "results.csv", [row], ["experts", "top_k", "skew"])
    plot(frame)
    print(environment())
    print(frame[["against_dense", "against_mixtral", "mfu"]].median())


if __name__ == "__main__":
    main()
