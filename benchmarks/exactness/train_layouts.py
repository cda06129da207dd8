"""Train the same run on several layouts of this job's ranks: `mpirun -np N python -m … FOLDER STEPS PRECISION`.

Rank 0 prints one line of JSON per run: family, layout, SHA-256 of what was reported and of weights and moments.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

import pipeline
from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.step_folders import find
from fira.training.config import TrainConfig
from fira.training.loop import train
from fira.training.signals import Signals

# Small models with dropout, auxiliary losses and, for blues, tied embeddings. Some widths do not fill vectors.
MODELS = {
    "fira": "d_model=36,n_head=3,num_layers=6,d_ff=52,num_experts=4,dropout=0.1",
    "rish": "d_model=32,n_head=4,n_kv_head=2,num_layers=6,d_ff=36,num_experts=4",
    "mooshak": "d_model=32,n_head=4,num_layers=6,d_ff=72",
    "blues": "d_model=32,n_head=4,n_kv_head=2,num_layers=6,d_ff=48,num_experts=4,dropout=0.1",
    "microrwkv": "d_model=32,n_head=4,n_group=2,num_layers=6",
}
REPORTED = ["train_loss", "val_loss", "grad_norm", "aux_loss", "expert_load", "router_entropy"]


def layouts(ranks: int) -> list[dict[str, Any]]:
    """The layouts of a number of ranks, as settings of a run."""

    def layout(pp: int, dp: int, ep: int = 1, **settings: Any) -> dict[str, Any]:
        return {"pp": pp, "dp": dp, "ep": ep, **settings}

    zero_bubble = ("zb-h1", "zb-2p", "zb-v")
    return {
        1: [layout(1, 1), layout(1, 1, recompute="full")],
        2: [
            *(layout(2, 1, schedule=schedule) for schedule in ("1f1b", "gpipe", "interleaved", *zero_bubble)),
            layout(2, 1, recompute="2"),
            layout(1, 2),
            layout(1, 2, 2),
            layout(1, 2, 2, recompute="full"),
        ],
        3: [layout(3, 1), layout(1, 3)],
        4: [
            *(layout(4, 1, schedule=schedule) for schedule in ("1f1b", "zb-v")),
            *(layout(1, 4, ep) for ep in (1, 2, 4)),
            layout(2, 2),
            *(layout(2, 2, 2, schedule=schedule) for schedule in ("1f1b", "interleaved", *zero_bubble)),
            layout(2, 2, 2, recompute="full"),
        ],
        6: [layout(3, 2, 2), layout(2, 3)],
        8: [layout(2, 4, 4, schedule="zb-v"), layout(4, 2, 2)],
    }[ranks]


def main(folder: str, steps: str, precision: str) -> None:
    world = pipeline.init()
    torch.set_num_threads(1)
    for family, changes in MODELS.items():
        runs = layouts(world.size)
        if family == "mooshak":  # it has no experts
            runs = [{**settings, "ep": 1} for settings in runs]
            runs = [settings for number, settings in enumerate(runs) if settings not in runs[:number]]
        for number, settings in enumerate(runs):
            out = Path(folder) / f"{family}-{world.size}-{number}"
            config = TrainConfig(
                model=f"{family}-tiny",
                model_set=changes,
                data="docs",
                vocab_size=512,
                seq_len=24,
                batch_size=6,
                micro_batch_size=2,
                steps=int(steps),
                eval_every=50,
                save_every=steps,
                keep=1,
                device="cpu",
                precision=precision,
                out=str(out),
                **settings,
            )
            train(config, world, Signals(), quiet=True)
            saved = Checkpoint.open(find(out))
            if world.rank == 0:
                print(json.dumps({"family": family, **settings, **digests(out, saved)}), flush=True)


def digests(out: Path, saved: Checkpoint) -> dict[str, str]:
    """Digests of what a run reported in each step, and of all tensors of its last checkpoint."""
    with open(out / "training_log.csv", newline="") as file:
        rows = [[row[name] for name in REPORTED] for row in csv.DictReader(file)]
    index = json.loads(saved.file("index.json"))["tensors"]
    tensors = hashlib.sha256()
    for name in sorted(index):
        tensors.update(name.encode() + saved.read(name).numpy().tobytes())
    return {"reported": hashlib.sha256(json.dumps(rows).encode()).hexdigest(), "tensors": tensors.hexdigest()}


if __name__ == "__main__":
    main(*sys.argv[1:])
