"""`fira doctor --gpu`: run every check with its time limit, and write a report for a bug tracker."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fira.doctor import kernel_checks, rank_checks, screen, training_checks
from fira.doctor.finding import Finding
from fira.doctor.gpu_check import RESULT, GpuCheck, Target
from fira.doctor.gpus import find_devices
from fira.doctor.limited_process import run_limited, without_launcher
from fira.errors import UserError
from pipeline.schedule import SCHEDULES

REPORT = Path("fira-doctor.md")
SHOWN_LINES = 30  # of the output of a check that failed
PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # waiting threads do not slow down the other rank
FIRST_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
SHARED = {"CUDA_VISIBLE_DEVICES": FIRST_GPU}  # of both ranks, so that messages pass through MPI

CHECKS: tuple[GpuCheck, ...] = (
    GpuCheck("grouped product in bf16", kernel_checks.grouped_product, 90),
    GpuCheck("dropout bits", kernel_checks.dropout_bits, 90),
    GpuCheck("training in fp32", training_checks.precision, 240, arguments=("fp32",)),
    GpuCheck("training in bf16", training_checks.precision, 150, arguments=("bf16",)),
    GpuCheck("training in fp16", training_checks.precision, 150, arguments=("fp16",)),
    GpuCheck("--recompute full", training_checks.recompute, 150),
    GpuCheck("--resume auto", training_checks.resume, 150),
    GpuCheck("collectives, shared GPU", rank_checks.collectives, 90, environment=SHARED),
    *(
        GpuCheck(f"{' '.join(flags)}, shared GPU", training_checks.two_ranks, 150, arguments=flags, environment=SHARED)
        for flags in (("--pp", "2"), ("--pp", "2", "--schedule", "zb-v"), ("--dp", "2", "--ep", "2"))
    ),
    GpuCheck("host synchronisations", kernel_checks.synchronisations, 90),
    GpuCheck("profile, dropout 0", kernel_checks.profile, 150, arguments=("0.0",)),
    GpuCheck("profile, dropout 0.1", kernel_checks.profile, 150, arguments=("0.1",)),
    GpuCheck("--local-devices", training_checks.local_devices, 150, gpus=2),
    GpuCheck("collectives, NCCL", rank_checks.collectives, 90, gpus=2),
    GpuCheck("CUDA contexts", rank_checks.contexts, 90, gpus=2),
    *(
        GpuCheck(
            f"--pp 2 --schedule {name}",
            training_checks.two_ranks,
            150,
            gpus=2,
            arguments=("--pp", "2", "--schedule", name),
        )
        for name in SCHEDULES
    ),
    GpuCheck("--pp 2 --trace", training_checks.trace, 150, gpus=2),
    GpuCheck("--dp 2 --ep 2", training_checks.two_ranks, 150, gpus=2, arguments=("--dp", "2", "--ep", "2")),
    GpuCheck("exit status", training_checks.exit_status, 150, gpus=2),
    GpuCheck("benchmarks.gpu.run", kernel_checks.benchmark, 300),
)


@dataclass(frozen=True)
class Result:
    """A check and how it ended. verdict: OK, failed, or timed out. detail: one line. text: the result or the output."""

    check: GpuCheck
    verdict: str
    detail: str
    text: str
    seconds: float


def examine_gpus(train: tuple[str, ...], show_line: Callable[[str], object]) -> bool:
    """Run all checks that this machine has the GPUs for, write the report, and return whether all are OK.

    train: the words that start training. Raises UserError without a GPU.
    """
    facts, _ = find_devices()
    if facts is None or not facts.gpus:
        found = f"torch {torch.__version__} sees no GPU"
        raise UserError(f"--gpu: {found}; run it without --gpu, which says what to do about the driver or torch")
    checks = [check for check in CHECKS if check.gpus <= len(facts.gpus)]
    findings = screen.show(None, show_line)
    show_line("")
    with tempfile.TemporaryDirectory(prefix="fira-doctor-") as folder:
        results = run_checks(checks, Target("cuda", folder, train), findings, REPORT, show_line)
    return all(result.verdict == "OK" for result in results)


def run_checks(
    checks: Sequence[GpuCheck],
    target: Target,
    findings: list[Finding],
    report: Path,
    show_line: Callable[[str], object],
) -> list[Result]:
    """Run the checks one after another, each in a process of its own. The report is rewritten after each of them."""
    results: list[Result] = []
    longest = sum(check.limit_s for check in checks) / 60
    show_line(f"{len(checks)} checks, at most {longest:.0f} minutes")
    for number, check in enumerate(checks, 1):
        show_line(f"[{number}/{len(checks)}] {check.name} …")
        results.append(run_check(check, target))
        verdict, seconds = results[-1].verdict, results[-1].seconds
        show_line(f"      {verdict} after {seconds:.1f} s: {results[-1].detail}")
        report.write_text(as_markdown(results, len(checks), findings), encoding="utf-8")
    failed = sum(result.verdict != "OK" for result in results)
    show_line(f"\n{len(results) - failed} of {len(results)} checks are OK; report: {report}")
    if failed:
        show_line("attach the report to an issue")
    return results


def run_check(check: GpuCheck, target: Target) -> Result:
    """Run one check. Processes that it leaves behind are ended and make it fail."""
    environment = without_launcher(os.environ) | PASSIVE | check.environment
    outcome = run_limited(check.command(target), check.limit_s, environment)
    _, found, result = outcome.output.partition(f"{RESULT}\n")
    if outcome.status == 0 and found and not outcome.left:
        return Result(check, "OK", result.splitlines()[0], result.rstrip(), outcome.seconds)
    if outcome.status is None:
        verdict, detail = "timed out", f"stopped after {check.limit_s:.0f} s"
    elif outcome.left:
        verdict, detail = "failed", f"left {outcome.left} processes behind"
    else:
        verdict, detail = "failed", outcome.last_lines(1) or f"ended with status {outcome.status}"
    return Result(check, verdict, detail, outcome.last_lines(SHOWN_LINES), outcome.seconds)


def as_markdown(results: Sequence[Result], planned: int, findings: list[Finding]) -> str:
    """The report: the machine, a table of the checks, and the output of those that failed or have more to show."""
    ok = sum(result.verdict == "OK" for result in results)
    rows = [
        f"| {r.check.name} | {r.verdict} | {r.seconds:.1f} of {r.check.limit_s:.0f} | {_cell(r.detail)} |"
        for r in results
    ]
    parts = [
        "# GPU check of Fira",
        f"{ok} of {len(results)} checks are OK; {planned - len(results)} of {planned} were not run.",
        "## Machine",
        screen.environment_text(findings),
        "## Checks",
        "\n".join(["| check | result | seconds | detail |", "|---|---|---|---|", *rows]),
    ]
    for result in results:
        if result.verdict != "OK" or "\n" in result.text:
            parts += [f"### {result.check.name}: {result.verdict}", f"```text\n{result.text or 'no output'}\n```"]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return text.replace("|", "\\|")
