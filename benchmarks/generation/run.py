"""Decoding speed compared with transformers' generate, with the same weights: mooshak as Llama, rish as FlexOlmo.

    python -m benchmarks.generation.run

Greedy, in fp32 on the CPU; the share of equal tokens is reported. Writes results.csv and results.png.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from torch import Tensor

from benchmarks.measure import alternate, environment, merge, ratio
from fira.models.mooshak import MooshakConfig
from fira.models.registry import PRESETS, build
from fira.models.rish import RishConfig
from tests.fira.models.transformers_twin import twin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROUNDS = 5
PROMPT, NEW = 32, 64
SMALL: dict[str, Any] = {"vocab_size": 8192, "seq_len": 256, "d_model": 512, "n_head": 8, "num_layers": 8}
MODELS = {
    "mooshak-tiny": PRESETS["mooshak-tiny"],
    "rish-tiny": PRESETS["rish-tiny"],
    "mooshak, 32M": MooshakConfig(**SMALL, d_ff=1376),
    "rish, 60M": RishConfig(**SMALL, n_kv_head=4, d_ff=512, num_experts=8, top_k=2, max_position=256),
}


@dataclass(frozen=True)
class Pair:
    """Fira's model and transformers' model with the same weights."""

    ours: Any
    theirs: Any

    def fira(self, prompt: Tensor) -> Tensor:
        return self.ours.generate(prompt, NEW, temperature=0)

    def transformers(self, prompt: Tensor) -> Tensor:
        return self.theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=True)


def make_pair(config: Any) -> Pair:
    ours = build(config).eval()
    theirs = twin(config, dict(ours.named_parameters()), torch.float32)
    theirs.config._experts_implementation = "grouped_mm" if isinstance(config, RishConfig) else None
    theirs.generation_config.pad_token_id = 0
    theirs.generation_config.eos_token_id = None
    return Pair(ours, theirs)


def measure(name: str, config: Any, batch: int) -> dict[str, object]:
    """Return one row of the results: new tokens per second of both, including the prompt's time, and their ratio."""
    torch.manual_seed(0)
    pair = make_pair(replace(config, seq_len=max(config.seq_len, PROMPT + NEW)))
    prompt = torch.randint(config.vocab_size, (batch, PROMPT))
    generated = [pair.fira(prompt), pair.transformers(prompt)]
    agreement = float((generated[0] == generated[1]).float().mean())
    contenders = {"Fira": lambda: pair.fira(prompt), "transformers": lambda: pair.transformers(prompt)}
    seconds = alternate(contenders, ROUNDS)
    speed = {f"{n} tokens/s": batch * NEW / statistics.median(v) for n, v in seconds.items()}
    against = ratio(seconds["transformers"], seconds["Fira"])
    return {"model": name, "batch": batch, "ratio": against, **speed, "same_tokens": agreement}


def plot(frame: Any) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, name in enumerate(("Fira", "transformers")):
        axes.bar([place + 0.4 * i for place in range(len(frame))], frame[f"{name} tokens/s"], 0.4, label=name)
    for place, row in enumerate(frame.itertuples()):
        axes.text(place + 0.2, max(row._4, row._5) * 1.05, f"{row.ratio:.1f}×", ha="center")
    labels = [f"{row.model}\nbatch {row.batch}" for row in frame.itertuples()]
    axes.set_xticks([place + 0.2 for place in range(len(frame))], labels, fontsize=8)
    axes.set(ylabel="new tokens per second", yscale="log")
    axes.set_ylim(top=axes.get_ylim()[1] * 2)
    axes.legend(loc="upper left")
    figure.savefig(HERE / "results.png", dpi=110)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    for name, config in MODELS.items():
        for batch in (1, 16):
            row = measure(name, config, batch)
            print({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            frame = merge(HERE / "results.csv", [row], ["model", "batch"])
    plot(frame)
    print(environment())


if __name__ == "__main__":
    main()
