"""GPU checks that train fira-tiny with the commands that a user types, on one or two ranks, and compare the logs."""

import csv
import re
import shutil
from pathlib import Path

import torch

from fira.devices import auto_precision
from fira.doctor.gpu_check import Target, mpirun, run_program

STEPS = 20
MODEL = ("--model", "fira-tiny", "--vocab-size", "512", "--seq-len", "64", "--batch-size", "8", "--eval-sequences", "8")
RUN = ("--steps", str(STEPS), "--warmup", "5", "--save-every", str(STEPS // 2))
HANG_S = 60  # seconds after which a rank that waits ends the job with a report
# Largest relative differences of the loss in the first step, and in any step, in which rounding has been amplified.
FIRST_STEP = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
ANY_STEP = {"fp32": 2e-2, "bf16": 5e-2, "fp16": 5e-2}

Log = list[dict[str, str]]


def precision(target: Target, name: str) -> str:
    """Train in a precision on the device, and compare the losses with fp32 on the CPU."""
    selected = auto_precision(torch.device(target.device))
    if name not in ("fp32", selected, "fp16" if selected == "bf16" else selected):
        return f"not run: this device emulates {name}, which takes too long; auto selects {selected}"
    flags = ("--device", "cpu", "--precision", "fp32")
    expected = trained(target, "cpu", *flags)
    return compare(run(target, name, "--precision", name), expected, name)


def recompute(target: Target) -> str:
    """`--recompute full` trains as without."""
    return compare(run(target, "recompute", "--recompute", "full"), baseline(target))


def resume(target: Target) -> str:
    """A run resumed in the middle by `--resume auto` continues as the uninterrupted run."""
    expected = baseline(target)
    folder = target.path / "resumed"
    shutil.copytree(target.path / "baseline", folder, ignore=shutil.ignore_patterns(f"step-*{STEPS}", "latest"))
    flags = ("--precision", "fp32", "--resume", "auto", "--out", str(folder))
    output = run_program([*target.train, *base_flags(target), *flags], environment=variables(target))
    assert f"resumed after step {STEPS // 2}" in output, f"{output}\nthe run was not resumed"
    return compare(read_log(folder), expected)


def local_devices(target: Target) -> str:
    """Two devices in one process by torchgpipe train as one."""
    devices = "cpu,cpu" if target.device == "cpu" else "cuda:0,cuda:1"
    return compare(run(target, "local", "--local-devices", devices), baseline(target))


def two_ranks(target: Target, *flags: str) -> str:
    """Two ranks train as one. Ranks with a GPU each use NCCL, ranks that share a GPU use MPI."""
    name = "ranks" + re.sub(r"\W+", "-", " ".join(flags))
    return compare(run(target, name, *flags, ranks=2), baseline(target))


def trace(target: Target) -> str:
    """`--trace` on two pipeline ranks writes a file and does not change the training."""
    path = target.path / "trace.json"
    result = two_ranks(target, "--pp", "2", "--trace", str(path))
    assert path.stat().st_size > 0, "the trace is empty"
    return result


def exit_status(target: Target) -> str:
    """A run that diverges, and one with invalid flags, end on both ranks with status 2 and one line."""
    diverging = ("--precision", "fp32", "--pp", "2", "--lr", "1e30", "--min-lr", "1e30", "--clip", "0")
    for name, flags in (("diverging", diverging), ("invalid", ("--pp", "3"))):
        words = [*mpirun(2), *target.train, *base_flags(target), *flags, "--out", str(target.path / name)]
        output = run_program(words, 2, variables(target))
        assert "Traceback" not in output, f"{output}\nthe error of {' '.join(flags)} has a traceback"
    return "both runs ended with status 2"


def baseline(target: Target) -> Log:
    """The log of one rank on one device in fp32."""
    return trained(target, "baseline", *device_flags(target), "--precision", "fp32")


def trained(target: Target, name: str, *flags: str) -> Log:
    """The log of a run on one rank, which is made unless an earlier check has made it."""
    folder = target.path / name
    if not (folder / "training_progress.png").exists():
        shutil.rmtree(folder, ignore_errors=True)  # a check that was stopped may have left it incomplete
        words = [*target.train, *base_flags(target), *flags, "--out", str(folder)]
        run_program(words, environment=variables(target))
    return read_log(folder)


def run(target: Target, name: str, *flags: str, ranks: int = 1) -> Log:
    """Train in fp32, or as the flags say, and return the log."""
    folder = target.path / name
    shutil.rmtree(folder, ignore_errors=True)
    default = () if "--precision" in flags else ("--precision", "fp32")
    devices = () if "--local-devices" in flags else device_flags(target)
    words = [*mpirun(ranks), *target.train, *base_flags(target), *devices, *default, *flags, "--out", str(folder)]
    run_program(words, environment=variables(target))
    return read_log(folder)


def base_flags(target: Target) -> tuple[str, ...]:
    """The flags of all runs. The text to train on is Fira's own source, which every installation has."""
    text = target.path / "text.txt"
    if not text.exists():
        sources = sorted(Path(__file__).parents[1].rglob("*.py"))
        text.write_text("\n\n".join(source.read_text(encoding="utf-8") for source in sources)[:200_000])
    return (*MODEL, *RUN, "--data", str(text))


def device_flags(target: Target) -> tuple[str, ...]:
    return ("--device", target.device)


def variables(target: Target) -> dict[str, str]:
    return {
        "FIRA_CACHE": str(target.path / "cache"),
        "PIPELINE_MPI_TIMEOUT_S": str(HANG_S),
        "PIPELINE_MPI_HANG_DIR": str(target.path),
    }


def read_log(folder: Path) -> Log:
    with (folder / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def compare(log: Log, expected: Log, precision: str = "fp32") -> str:
    """Compare the losses of two runs. Raises AssertionError if they differ by more than rounding explains."""
    assert len(log) == len(expected), f"{len(log)} steps instead of {len(expected)}"
    pairs = [(float(a["train_loss"]), float(b["train_loss"])) for a, b in zip(log, expected, strict=True)]
    differences = [abs(a - b) / b for a, b in pairs]
    first, largest = differences[0], max(differences, key=lambda d: (d != d, d))  # NaN is larger than any number
    losses = f"loss {pairs[0][0]:.4f} → {pairs[-1][0]:.4f}"
    limits = f"allowed: {FIRST_STEP[precision]:.0e} in the first step, {ANY_STEP[precision]:.0e} in any"
    assert first <= FIRST_STEP[precision], f"{losses}; the first step differs by {first:.1e}; {limits}"
    assert largest <= ANY_STEP[precision], f"{losses}; a step differs by {largest:.1e}; {limits}"
    assert pairs[-1][0] < pairs[0][0], f"{losses}: the loss has not fallen"
    return f"{losses}, {'identical' if largest == 0 else f'largest difference {largest:.0e}'}"
