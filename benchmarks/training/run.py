"""Training steps of a fira of 30 million parameters in several layouts, compared with other libraries.

    python -m benchmarks.training.run

Jobs of one process with all cores, of two and of four ranks take turns, one step each, so that a temporary slowdown of
the machine affects all of them. Writes results.csv and results.png.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import matplotlib
import pandas as pd

from benchmarks.measure import environment, products, ratio
from benchmarks.training.ranks import BATCH, CONFIG
from benchmarks.turns import Job
from fira.models.fira import FIRA
from fira.parallel.parallelize import layer_flops

HERE = Path(__file__).parent
ROUNDS = 5
BASE = "ours, pp 1 × dp 1"  # one process with all cores


def measure() -> dict[tuple[int, str], list[float]]:
    """Return the seconds of each round by number of ranks and contender."""
    with ExitStack() as stack:
        jobs = {ranks: stack.enter_context(Job(ranks, "benchmarks.training.ranks")) for ranks in (1, 2, 4)}
        turns = [(ranks, name) for ranks, job in jobs.items() for name in job.names]
        seconds: dict[tuple[int, str], list[float]] = {turn: [] for turn in turns}
        for number in range(ROUNDS):
            for ranks, name in turns[:: -1 if number % 2 else 1]:
                seconds[ranks, name].append(jobs[ranks].time(name))
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
    return seconds


def table(seconds: dict[tuple[int, str], list[float]]) -> pd.DataFrame:
    """Return a row per contender; its speed is the median of the rounds' ratios to one process of Fira."""
    model = FIRA(CONFIG)
    count = BATCH * CONFIG.seq_len
    flops = 3 * sum(layer_flops(model)) * count
    peak, peak_flops = seconds.pop((1, "peak")), products()[1]
    print(f"{model.num_parameters():,} parameters, peak {peak_flops / median(peak) / 1e9:.0f} GFLOP/s; {environment()}")
    return pd.DataFrame(
        {
            "ranks": ranks,
            "contender": name,
            "seconds": median(times),
            "tokens_per_s": count / median(times),
            "mfu": flops / peak_flops * ratio(peak, times),
            "speed": ratio(seconds[1, BASE], times),
        }
        for (ranks, name), times in seconds.items()
    )


def draw(rows: pd.DataFrame) -> None:
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    labels = [f"{row.contender}, {row.ranks} ranks" for row in rows.itertuples()]
    colours = ["C0" if row.contender.startswith("ours") else "C7" for row in rows.itertuples()]
    axes.barh(labels, rows["tokens_per_s"], color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of training steps")
    figure.savefig(HERE / "results.png", dpi=110)


def main() -> None:
    rows = table(measure())
    rows.to_csv(HERE / "results.csv", index=False, float_format="%.4g")
    draw(rows)
    print("| ranks | contender | tokens/s | MFU | one process of ours = 1 |\n|---|---|---|---|---|")
    for row in rows.itertuples():
        print(f"| {row.ranks} | {row.contender} | {row.tokens_per_s:,.0f} | {row.mfu:.2f} | {row.speed:.2f} |")


if __name__ == "__main__":
    main()
