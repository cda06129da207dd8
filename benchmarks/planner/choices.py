"""The automatic layout compared with all others, in cases that the planner was not tuned with.

    python -m benchmarks.planner.choices

Writes choices.csv and prints the table of the README.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LARGE = "d_model=512,num_layers=8,n_head=8"
CASES = {  # name: (preset, changes, sequences per batch, tokens per sequence, numbers of ranks)
    "fira-tiny": ("fira-tiny", "", 12, 64, (1, 2, 4)),
    "fira-tiny, default": ("fira-tiny", "", 32, 128, (2, 4)),
    "fira-tiny, long": ("fira-tiny", "", 8, 1024, (2,)),
    "rish-tiny": ("rish-tiny", "", 64, 64, (4,)),
    "mooshak-tiny": ("mooshak-tiny", "", 16, 128, (1, 4)),
    "blues-tiny": ("blues-tiny", "", 8, 256, (2,)),
    "microrwkv-tiny": ("microrwkv-tiny", "", 16, 128, (1, 4)),
    "mooshak 5M": ("mooshak-tiny", "d_model=256,num_layers=4,d_ff=512", 16, 128, (1, 2, 4)),
    "fira 20M": ("fira-tiny", "d_model=384,num_layers=6,d_ff=1024,n_head=6,num_experts=4", 16, 64, (1, 2, 4)),
    "blues 60M": ("blues-tiny", f"{LARGE},d_ff=1536,num_experts=4", 8, 64, (1, 4)),
}
FIELDS = (
    *("case", "million_parameters", "ranks", "chosen", "best", "chosen_ms", "best_ms", "promised_ms"),
    *("candidates", "measured_candidates", "cold_s", "cached_s"),
)


def main() -> None:
    rows = []
    for case, (preset, changes, batch, seq_len, numbers) in CASES.items():
        for ranks in numbers:
            with tempfile.TemporaryDirectory() as cache:  # of costs that were measured under another load
                command = ["mpirun", "-np", str(ranks), sys.executable, "-m", "benchmarks.planner.choice_ranks"]
                command += [preset, changes, str(batch), str(seq_len)]
                result = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"FIRA_CACHE": cache}
                )
            rows.append({"case": f"{case}, {batch} × {seq_len}", "ranks": ranks, **json.loads(result.stdout)})
            print(rows[-1], file=sys.stderr, flush=True)
            with (HERE / "choices.csv").open("w", newline="") as file:  # also if the next one fails
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
    print("| case | parameters | ranks | chosen | chosen | best | ratio | promised | error | one process |")
    print("|" + "---|" * 10)
    for row in rows:
        single = next((r["chosen_ms"] for r in rows if r["case"] == row["case"] and r["ranks"] == 1), None)
        alone = f"{row['chosen_ms'] / single:.2f}" if single else ""
        print(
            f"| {row['case']} | {row['million_parameters']:.1f}M | {row['ranks']} | {row['chosen']} "
            f"| {row['chosen_ms']:.0f} ms | {row['best_ms']:.0f} ms | {row['chosen_ms'] / row['best_ms']:.2f} "
            f"| {row['promised_ms']:.0f} ms | {row['promised_ms'] / row['chosen_ms'] - 1:+.0%} | {alone} |"
        )


if __name__ == "__main__":
    main()
