"""`fira doctor --gpu`: run every check with its time limit, and write a report for a bug tracker."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fira.doctor import operation_checks, rank_checks, screen, step_checks, training_checks
from fira.doctor.finding import Finding, ShowLine
from fira.doctor.gpu_check import RESULT, GpuCheck, Target
from fira.doctor.gpus import find_devices
from fira.doctor.limited_process import run_limited
from fira.errors import UserError
from pipeline.mpi.launchers import without_launcher
from pipeline.schedule import SCHEDULES

REPORT = Path("fira-doctor.md")
SHOWN_LINES = 30  # of the output of a check that failed
BENCHMARK = "speed is measured by python -m benchmarks.gpu.run in a checkout, see benchmarks/gpu/README.md"
HANG_S = 60  # seconds after which a rank that waits ends the job with a report
FIRST_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
SHARED = {"CUDA_VISIBLE_DEVICES": FIRST_GPU}  # of both ranks, so that messages pass through MPI

TRAINING_S = 150  # time limit of most checks that train
COMPILATION_S = 300  # of those that train with --compile

CHECKS: tuple[GpuCheck, ...] = (
    *(GpuCheck(name, operation_checks.check_operation, 120, arguments=(name,)) for name in operation_checks.NAMES),
    GpuCheck("training in fp32", training_checks.precision, 240, arguments=("fp32",)),
    GpuCheck("training in bf16", training_checks.precision, TRAINING_S, arguments=("bf16",)),
    GpuCheck("training in fp16", training_checks.precision, TRAINING_S, arguments=("fp16",)),
    GpuCheck("--precision auto", training_checks.automatic_precision, TRAINING_S),
    GpuCheck("--compile --precision fp32", training_checks.compiled, COMPILATION_S, arguments=("fp32",)),
    GpuCheck("--compile --precision auto", training_checks.compiled, COMPILATION_S, arguments=("auto",)),
    GpuCheck("--recompute full", training_checks.recompute, TRAINING_S),
    GpuCheck("--resume auto", training_checks.resume, TRAINING_S),
    GpuCheck("collectives, shared GPU", rank_checks.collectives, 90, environment=SHARED, ranks=2),
    *(
        GpuCheck(f"{flags}, shared GPU", training_checks.two_ranks, TRAINING_S, 1, tuple(flags.split()), SHARED)
        for flags in ("--pp 2", "--pp 2 --schedule zb-v", "--dp 2 --ep 2")
    ),
    GpuCheck("host synchronisations", step_checks.synchronisations, 90),
    GpuCheck("profile, dropout 0", step_checks.profile, TRAINING_S, arguments=("0.0",)),
    GpuCheck("profile, dropout 0.1", step_checks.profile, TRAINING_S, arguments=("0.1",)),
    GpuCheck("--local-devices", training_checks.local_devices, TRAINING_S, gpus=2),
    GpuCheck("collectives, NCCL", rank_checks.collectives, 90, gpus=2, ranks=2),
    GpuCheck("CUDA contexts", rank_checks.contexts, 90, gpus=2, ranks=2),
    *(
        GpuCheck(flags, training_checks.two_ranks, TRAINING_S, 2, tuple(flags.split()))
        for flags in (*(f"--pp 2 --schedule {name}" for name in SCHEDULES), "--dp 2 --ep 2")
    ),
    GpuCheck("--pp 2 --trace", training_checks.trace, TRAINING_S, gpus=2),
    GpuCheck("exit status", training_checks.exit_status, TRAINING_S, gpus=2),
)


@dataclass(frozen=True)
class Result:
    """A check and how it ended. verdict: OK, failed, or timed out. detail: one line. text: the result or the output."""

    check: GpuCheck
    verdict: str
    detail: str
    text: str
    seconds: float


def examine_gpus(train: tuple[str, ...], show_line: ShowLine) -> bool:
    """Run all checks that this machine has the GPUs for, write the report, and return whether all are OK.

    train: the words that start training. Raises UserError without a GPU.
    """
    facts, _ = find_devices()
    if facts is None or not facts.gpus:
        remedy = "run it without --gpu, which says what to do about the driver or torch"
        raise UserError(f"--gpu: torch {torch.__version__} sees no GPU; {remedy}")
    checks = [check for check in CHECKS if check.gpus <= len(facts.gpus)]
    findings = screen.show(None, show_line)
    show_line("")
    with tempfile.TemporaryDirectory(prefix="fira-doctor-") as folder:
        results = run_checks(checks, Target("cuda", folder, train), findings, REPORT, show_line)
    return all(result.verdict == "OK" for result in results)


def run_checks(
    checks: Sequence[GpuCheck], target: Target, findings: list[Finding], report: Path, show_line: ShowLine
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
    show_line("attach the report to an issue" if failed else BENCHMARK)
    return results


def run_check(check: GpuCheck, target: Target) -> Result:
    """Run one check. Processes that it leaves behind are ended and make it fail."""
    environment = {
        "OMP_WAIT_POLICY": "passive",  # waiting threads do not slow down the other rank
        "FIRA_CACHE": str(target.path / "cache"),
        "PIPELINE_MPI_TIMEOUT_S": str(HANG_S),
        "PIPELINE_MPI_HANG_DIR": target.folder,
    }
    variables = without_launcher(os.environ) | environment | check.environment
    outcome = run_limited(check.command(target), check.limit_s, variables)
    _, found, result = outcome.output.partition(f"{RESULT}\n")
    verdict, text = "failed", outcome.last_lines(SHOWN_LINES)
    if outcome.status is None:
        verdict, detail = "timed out", f"stopped after {check.limit_s:.0f} s"
    elif outcome.left:
        detail = f"left {outcome.left} processes behind"
    elif outcome.status == 0 and found:
        verdict, detail, text = "OK", result.splitlines()[0], result.rstrip()
    else:
        detail = outcome.last_lines(1) or f"ended with status {outcome.status}"
    return Result(check, verdict, detail, text, outcome.seconds)


def as_markdown(results: Sequence[Result], planned: int, findings: list[Finding]) -> str:
    """The report: the machine, a table of the checks, and the output of those that failed or have more to show."""
    ok = sum(result.verdict == "OK" for result in results)
    rows = [
        [r.check.name, r.verdict, f"{r.seconds:.1f} of {r.check.limit_s:.0f}", r.detail.replace("|", "\\|")]
        for r in results
    ]
    parts = [
        "# GPU check of Fira",
        f"{ok} of {len(results)} checks are OK; {planned - len(results)} of {planned} were not run. {BENCHMARK}",
        "## Machine",
        screen.environment_text(findings),
        "## Checks",
        screen.markdown_table(["check", "result", "seconds", "detail"], rows),
    ]
    for result in results:
        if result.verdict != "OK" or "\n" in result.text:
            parts += [f"### {result.check.name}: {result.verdict}", f"```text\n{result.text or 'no output'}\n```"]
    return "\n\n".join(parts) + "\n"
