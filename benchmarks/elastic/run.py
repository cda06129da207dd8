"""A supervised run whose ranks are killed at random times, next to an undisturbed one.

    python -m benchmarks.elastic.run [--kills 30] [--every 60] --steps 2000 [other flags of fira train]

4 ranks on this machine. A kill leaves 2, 3 or 4 slots, and all 4 return before the next kill. The weights of both runs
must have the same SHA-256. Effective time: duration of the steps that are part of the result over wall time.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from benchmarks.elastic.observed_run import ObservedRun, tensors_sha256
from benchmarks.elastic.picture import draw
from benchmarks.measure import environment

RANKS = 4
SLOTS_LEFT = (4, 4, 3, 2)  # after a kill, drawn at random
HERE = Path(__file__).parent


def disturb(run: ObservedRun, kills: int, every: float, chooser: random.Random) -> None:
    """Kill a random rank about every `every` seconds; reduce the slots, and restore them before the next kill."""
    for _ in range(kills):
        pause = every * chooser.uniform(0.5, 1.5)
        run.observe(until=after(run, pause / 2))
        run.set_slots(RANKS)
        if not (run.observe(until=after(run, pause / 2)) and run.observe(until=lambda: bool(run.ranks()))):
            return
        slots = chooser.choice(SLOTS_LEFT)
        os.kill(chooser.choice(run.ranks()), signal.SIGKILL)
        run.set_slots(slots)
        run.kills.append({"time_s": run.seconds(), "slots": slots})
        print(f"kill {len(run.kills)} of {kills} after {run.seconds():.0f} s; {slots} slots are left", flush=True)
    run.observe(until=after(run, every / 2))
    run.set_slots(RANKS)


def after(run: ObservedRun, seconds: float) -> Callable[[], bool]:
    """A condition that holds some seconds from now on."""
    end = run.seconds() + seconds
    return lambda: run.seconds() > end


def run_once(folder: Path, options: argparse.Namespace, flags: list[str], kills: int) -> tuple[ObservedRun, dict]:
    """Run once, with a number of kills. Return the run and its row of results.csv."""
    run = ObservedRun(folder, f"2:{RANKS}", RANKS, flags)
    try:
        disturb(run, kills, options.every, random.Random(options.seed))
        run.observe(until=lambda: False)
    finally:
        status = run.stop()
    if status:
        raise SystemExit(f"the run ended with status {status}, see {run.out / 'events.jsonl'}")
    starts = [event["ranks"] for event in run.events() if event["event"] == "start"]
    wall, useful = run.samples[-1]["time_s"], run.useful_seconds()
    return run, {
        "run": f"{len(run.kills)} kills" if kills else "undisturbed",
        "steps": run.samples[-1]["step"],
        "starts": len(starts),
        "ranks": " ".join(map(str, starts)),
        "wall_s": wall,
        "useful_s": useful,
        "effective": useful / wall,
        "sha256": tensors_sha256(run.out)[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=float, default=60.0, help="mean time between kills in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the times, ranks and slots")
    parser.add_argument("--folder", type=Path, help="of both runs; default: a temporary one, which is removed")
    options, flags = parser.parse_known_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    rows = []
    for kills in (options.kills, 0):
        run, row = run_once(folder / f"{kills}-kills", options, flags, kills)
        rows.append(row)
        print(row, flush=True)
        if kills:
            draw(run.table(), run.kills, run.events(), HERE / "results.png")
            run.table().to_csv(HERE / "samples.csv", index=False, float_format="%.5g")
    pd.DataFrame(rows).to_csv(HERE / "results.csv", index=False, float_format="%.4g")
    print(environment())
    if not options.folder:
        shutil.rmtree(folder)
    if rows[0]["sha256"] != rows[1]["sha256"]:
        raise SystemExit("the weights differ")


if __name__ == "__main__":
    main()
