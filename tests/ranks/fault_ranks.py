"""Training runs on all ranks into which numerical faults are injected, and what they leave."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fira.commands.train import main
from fira.data.mixture import Mixture
from fira.errors import UserError
from fira.training import numerical_faults, run_report
from fira.training.trainer import StepSums, Trainer
from tests.fira.checkpoint.checkpoint_files import edit_document, hashes
from tests.ranks.train import write_empty_picture

BATCH = 6


def train(flags: list[str], run: str, faults: dict[int, float] | None = None, extra: list[str] | None = None) -> str:
    """Train, and return the message of the UserError that ends the run, or an empty string.

    faults: sequence number → factor by which the loss of every step that reads this sequence is multiplied.
    """
    step, all_reduce, read = Trainer.step, StepSums.all_reduce, list[range]()

    def recording_step(self: Trainer, loader: Mixture, sequences: int, *args: Any, **options: Any) -> Any:
        read[:] = [range(loader.consumed, loader.consumed + sequences)]
        return step(self, loader, sequences, *args, **options)

    def faulty_sums(self: StepSums) -> StepSums:
        sums = all_reduce(self)
        for number, factor in (faults or {}).items():
            if number in read[0]:
                sums = replace(sums, reports=sums.reports * factor)
        return sums

    Trainer.step, StepSums.all_reduce = recording_step, faulty_sums  # type: ignore[method-assign]
    numerical_faults.WINDOW = 6
    try:
        with patch.object(run_report, "plot_files", write_empty_picture):
            main([*flags, "--out", run, *(extra or [])], prog="train.py")
    except UserError as error:
        return str(error)
    finally:
        Trainer.step, StepSums.all_reduce = step, all_reduce  # type: ignore[method-assign]
    return ""


def branch(source: str, step: int, target: str, consumed: int | None = None) -> str:
    """Copy a checkpoint of a run to another run folder, with another position in the data."""
    name = f"step-{step:06d}"
    folder = Path(target, "checkpoints", name)
    if dist.get_rank() == 0:
        shutil.copytree(Path(source, "checkpoints", name), folder)
        if consumed is not None:
            edit_document(folder, "state", lambda state: state["loader"].update(consumed=consumed))
    dist.barrier()
    return str(folder)


def outcome(run: str, step: int = 12) -> dict[str, Any]:
    """The files of tensors of a checkpoint by SHA-256, its rollbacks, and the steps in the log."""
    folder = Path(run, "checkpoints", f"step-{step:06d}")
    log = Path(run, "training_log.csv").read_text().splitlines()[1:]
    log = [line for line in log if not line.startswith("0,")]  # the validation before the first step
    return {
        "hashes": hashes(folder),
        "rollbacks": json.loads((folder / "state.json").read_text())["history"]["rollbacks"],
        "steps": [int(line.split(",")[0]) for line in log],
        "losses": [float(line.split(",")[1]) for line in log],
        "folders": sorted(path.name for path in Path(run, "checkpoints").iterdir()),
    }


SPIKE, NAN = {7 * BATCH + 1: 10.0}, {6 * BATCH + 1: float("nan")}  # in step 8; in step 7
ROLLBACK = ["--on-spike", "rollback"]


def roll_back(flags: list[str], out: str) -> dict[str, Any]:
    """A spike, and a loss that is not finite, with checkpoints after steps 3, 6, 9 and 12."""
    torch.set_num_threads(1)
    assert train([*flags, *ROLLBACK], f"{out}/spike", SPIKE) == ""
    assert train([*flags, *ROLLBACK], f"{out}/nan", NAN) == ""
    return {kind: outcome(f"{out}/{kind}") for kind in ("spike", "nan")}


def run_all(flags: list[str], out: str) -> dict[str, Any]:
    """The runs of `roll_back`, runs that start from their checkpoints, and runs that end with an error."""
    results, rollback = roll_back(flags, out), [*flags, *ROLLBACK]
    folder = branch(f"{out}/spike", 6, f"{out}/spike reference", consumed=8 * BATCH)
    assert train(flags, f"{out}/spike reference", extra=["--resume", folder]) == ""
    results["spike reference"] = outcome(f"{out}/spike reference")
    folder = branch(f"{out}/spike", 6, f"{out}/spike resumed")
    assert train(rollback, f"{out}/spike resumed", SPIKE, ["--resume", folder]) == ""
    results["spike resumed"] = outcome(f"{out}/spike resumed")
    assert train(flags, f"{out}/spike ignored", SPIKE) == ""
    results["spike ignored"] = outcome(f"{out}/spike ignored")

    folder = branch(f"{out}/nan", 3, f"{out}/nan reference", consumed=7 * BATCH)
    assert train(flags, f"{out}/nan reference", extra=["--resume", folder]) == ""
    results["nan reference"] = outcome(f"{out}/nan reference")
    results["stopped"] = train(flags, f"{out}/stopped", NAN)
    results["stopped folders"] = sorted(path.name for path in Path(f"{out}/stopped/checkpoints").glob("step-??????"))

    always = {number: float("nan") for number in range(4 * BATCH, 1000)}
    results["limit"] = train(rollback, f"{out}/limit", always)
    results["no checkpoint"] = train(rollback, f"{out}/none", {2: float("nan")})
    return results
