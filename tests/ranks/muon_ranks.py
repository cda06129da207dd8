"""Muon on each of several ranks, against torch.optim.Muon and against loops over experts in float64."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.models.registry import make_config
from fira.optim.muon import Muon, Replicated
from fira.optim.settings import OptimizerSettings
from fira.parallel.parallelize import parallelize
from fira.parallel.rank_optimizer import decayed_matrices, hidden_matrices
from pipeline.divided_work import DividedWork
from pipeline.mesh import CPU, Layout, make_mesh
from tests.ranks.parity_ranks import meta_model

STEPS, LR, DECAY = 4, 0.02, 0.3
MATRICES = {"wide": (5, 9), "tall": (11, 4), "square": (6, 6)}
EXPERTS = {"experts.w1": (3, 7, 5), "experts.w2": (3, 5, 7)}
OTHERS = {"embedding": (8, 6), "bias": (6,)}


def parameters(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for name, shape in shapes.items()}


def gradients(step: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def train(dtype: torch.dtype, **settings: Any) -> tuple[dict[str, nn.Parameter], Muon]:
    """Some steps with gradients that are equal on all ranks."""
    shapes = MATRICES | EXPERTS | OTHERS
    ours = parameters(shapes, dtype)
    replicated = [Replicated([*MATRICES], dist.group.WORLD), Replicated([*EXPERTS], dist.group.WORLD)]  # type: ignore[list-item]
    decayed = [*MATRICES, *EXPERTS, "embedding"]
    optimizer = Muon(ours, decayed, OptimizerSettings(weight_decay=DECAY, **settings), [*EXPERTS], replicated)
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(step, shapes, dtype).items():
            ours[name].grad = gradient
        optimizer.step(LR / step)
    return ours, optimizer


def torch_muon() -> dict[str, float]:
    """Largest difference from torch.optim.Muon for matrices, and from torch.optim.AdamW for all others.

    torch.optim.Muon computes its products in bfloat16, which this test replaces by float64.
    """
    torch.Tensor.bfloat16 = lambda self: self.clone()  # type: ignore[assignment, method-assign]
    dtype = torch.float64
    ours, _ = train(dtype)
    theirs = parameters(MATRICES | EXPERTS | OTHERS, dtype)
    muon = torch.optim.Muon(
        [theirs[name] for name in MATRICES], weight_decay=DECAY, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    groups = [{"params": [theirs["embedding"]], "weight_decay": DECAY}, {"params": [theirs["bias"]], "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(step, MATRICES | EXPERTS | OTHERS, dtype).items():
            theirs[name].grad = gradient
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = LR / step
            optimizer.step()
    return {name: float((ours[name] - theirs[name]).detach().abs().max()) for name in (*MATRICES, *OTHERS)}


def loops(cautious: bool, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of weights and moments from a loop over the experts and the singular values of each."""
    ours, optimizer = train(dtype, cautious_decay=cautious)
    theirs = parameters(MATRICES | EXPERTS | OTHERS, torch.float64)
    differences = {}
    for name, shape in EXPERTS.items():
        for e in range(shape[0]):
            weight, average = theirs[name].detach()[e], torch.zeros(shape[1:], dtype=torch.float64)
            for step in range(1, STEPS + 1):
                gradient = gradients(step, MATRICES | EXPERTS | OTHERS, torch.float64)[name][e]
                average = 0.95 * average + 0.05 * gradient
                u, s, vh = torch.linalg.svd(0.95 * average + 0.05 * gradient, full_matrices=False)
                s = s / s.square().sum().sqrt()
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                update, lr = u @ s.diag() @ vh, LR / step
                mask = (update * weight >= 0).double() if cautious else 1.0
                weight = weight - lr * DECAY * mask * weight - lr * 0.2 * max(shape[1:]) ** 0.5 * update
            differences[f"{name}[{e}]"] = float((ours[name][e] - weight).detach().abs().max())
            differences[f"exp_avg/{name}[{e}]"] = float((optimizer.moments[name][0][e] - average).abs().max())
    return differences


def cautious_difference() -> float:
    """The largest difference between the weights with and without cautious decay."""
    plain, cautious = (train(torch.float64, cautious_decay=value)[0] for value in (False, True))
    return max(float((plain[name] - cautious[name]).detach().abs().max()) for name in EXPERTS)


def hidden(preset: str) -> dict[str, list[str]]:
    """The names, within a layer, of the matrices that Muon updates, of those that it does not, and of those that decay.

    The model has value embeddings if the family can have them.
    """
    changes = {} if preset == "microrwkv-tiny" else {"value_embeddings": True}
    pp = dist.get_world_size()
    model = parallelize(meta_model(make_config(preset, changes)), make_mesh(Layout(pp, 1, 1), range(pp)), 0, [CPU])
    updated = {shard.name for shard in hidden_matrices(model)}
    matrices = {shard.name for shard in model.shards if shard.is_matrix}
    return {
        "muon": sorted({name.split(".", 2)[2] for name in updated}),
        "adamw": sorted({name.split(".", 2)[2] for name in matrices - updated}),
        "decayed": sorted({shard.name.split(".", 2)[2] for shard in decayed_matrices(model)}),
    }


def divided() -> dict[str, Any]:
    """Which of five tensors this rank computes, and what it gets."""
    like = [torch.empty(n, 2) for n in (1, 4, 2, 3, 1)]
    computed = []

    def compute(i: int) -> Tensor:
        computed.append(i)
        return torch.full(like[i].shape, 10.0 + i)

    work = DividedWork(like, [2, 8, 4, 6, 2], dist.group.WORLD)  # type: ignore[arg-type]
    results = {i: tensor.tolist() for i, tensor in work.results(compute)}
    none = [*DividedWork([], [], dist.group.WORLD).results(compute)]  # type: ignore[arg-type]
    return {"computed": computed, "results": [results[i] for i in range(len(like))], "none": len(none)}


def check_all() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "divided": divided(),
        "loops": [loops(cautious, torch.float64) for cautious in (False, True)],
        "cautious": cautious_difference(),
        "fp32": loops(False, torch.float32),
        "hidden": {preset: hidden(preset) for preset in ("fira-tiny", "blues-tiny", "microrwkv-tiny")},
        "torch": torch_muon(),
    }
