"""GPU checks that train fira-tiny with the commands that a user types, on one or two ranks, and compare the logs."""

import csv
import re
import shutil
import tomllib
from pathlib import Path

import torch

from fira.devices import AUTOCAST_DTYPES, auto_precision, measure_peak
from fira.doctor.gpu_check import Target, mpirun, run_program
from pipeline.mpi import init

MODEL = ("--model", "fira-tiny", "--vocab-size", "512", "--seq-len", "64", "--batch-size", "8", "--eval-sequences", "8")
# Largest relative differences of the loss in the first step, and in any step, in which rounding has been amplified.
FIRST_STEP = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
ANY_STEP = {"fp32": 2e-2, "bf16": 5e-2, "fp16": 5e-2}

Log = list[dict[str, str]]


def precision(target: Target, name: str) -> str:
    """Train in a precision on the device, and compare the losses with fp32 on the CPU."""
    selected = auto_precision(torch.device(target.device))
    if name not in ("fp32", selected, "fp16" if selected == "bf16" else selected):
        return f"not run: this device emulates {name}, which takes too long; auto selects {selected}"
    return compare(run(target, name, "--precision", name), cpu(target), name)


def automatic_precision(target: Target) -> str:
    """`--precision auto` selects bf16 or fp16 if the device has instructions for it, and trains in it."""
    log = run(target, "auto", "--precision", "auto")
    selected = tomllib.loads((target.path / "auto" / "config.toml").read_text())["precision"]
    device, expected = torch.device(target.device), "fp32"
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (7, 0):
        expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert selected == expected, f"{selected} is selected instead of {expected}"
    init()
    dtypes = {"fp32": torch.float32} | {name: d for name, d in AUTOCAST_DTYPES.items() if name == selected}
    peaks = ", ".join(f"{measure_peak([device], d) / 1e12:.3g} TFLOP/s in {name}" for name, d in dtypes.items())
    return f"{selected} selected; products {peaks}; {compare(log, cpu(target), selected)}"


def recompute(target: Target) -> str:
    """`--recompute full` trains as without."""
    return compare(run(target, "recompute", "--recompute", "full"), baseline(target))


def compiled(target: Target, precision: str) -> str:
    """`--compile` trains as fp32 on the CPU without it. precision: value of `--precision`."""
    selected = auto_precision(torch.device(target.device)) if precision == "auto" else precision
    log = run(target, f"compiled-{precision}", "--compile", "--precision", precision)
    return compare(log, cpu(target), selected)


def resume(target: Target) -> str:
    """A run resumed in the middle by `--resume auto` continues as the uninterrupted run."""
    expected = baseline(target)
    folder = target.path / "resumed"
    last = f"step-{target.steps:06d}"
    shutil.copytree(target.path / "baseline", folder, ignore=shutil.ignore_patterns(last, "latest"))
    output = train(target, folder, "--resume", "auto")
    assert f"resumed after step {target.steps // 2}" in output, f"{output}\nthe run was not resumed"
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
    for flags in ("--pp 2 --lr 1e30 --min-lr 1e30 --clip 0", "--pp 3"):
        output = train(target, target.path / flags, *flags.split(), ranks=2, status=2)
        assert "Traceback" not in output, f"{output}\nthe error of {flags} has a traceback"
    return "both runs ended with status 2"


def cpu(target: Target) -> Log:
    """The log of one rank on the CPU in fp32."""
    return trained(target, "cpu", "--device", "cpu", "--precision", "fp32")


def baseline(target: Target) -> Log:
    """The log of one rank on one device in fp32."""
    return trained(target, "baseline", "--device", target.device, "--precision", "fp32")


def trained(target: Target, name: str, *flags: str) -> Log:
    """The log of a run on one rank, which is made unless an earlier check has made it."""
    complete = (
        target.path / name / "training_progress.png"
    ).exists()  # else a check that was stopped may have begun it
    return read_log(target.path / name) if complete else run(target, name, *flags)


def run(target: Target, name: str, *flags: str, ranks: int = 1) -> Log:
    """Train in fp32 on the device, or as the flags say, and return the log."""
    folder = target.path / name
    shutil.rmtree(folder, ignore_errors=True)
    train(target, folder, *flags, ranks=ranks)
    return read_log(folder)


def train(target: Target, folder: Path, *flags: str, ranks: int = 1, status: int = 0) -> str:
    """Train in a folder and return the output. The text to train on is Fira's own source."""
    text = target.path / "text.txt"
    if not text.exists():
        sources = sorted(Path(__file__).parents[1].rglob("*.py"))
        text.write_text("\n\n".join(source.read_text(encoding="utf-8") for source in sources)[:200_000])
    default = ["--precision", "fp32"] if "--precision" not in flags else []
    default += ["--device", target.device] if "--local-devices" not in flags else []
    steps = ["--plan", "none", "--steps", str(target.steps), "--warmup", "5", "--save-every", str(target.steps // 2)]
    words = [*target.train, *MODEL, *steps, "--data", str(text), *default, *flags, "--out", str(folder)]
    return run_program([*mpirun(ranks), *words], status)


def read_log(folder: Path) -> Log:
    """The rows of a run's steps; row 0 is the validation before them."""
    with (folder / "training_log.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["iter"] != "0"]


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
