"""The job script that `fira slurm` writes.

time limit − grace_s      ─ SIGUSR1 to the script ─→ SIGTERM to the supervisor ─→ a checkpoint ─→ scontrol requeue
a rank fails              ─ the supervisor restarts the ranks within the job
a node fails, preemption  ─ Slurm requeues the job
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fira.training.finish_marker import FINISHED

# SIGTERM is not used, because scancel sends it as well, and a cancelled job must not be requeued.
BODY = """
export PATH={path}:"$PATH"{threads}
cd "$SLURM_SUBMIT_DIR" || exit 1

{command} &
run=$!
ending=
trap 'ending=1; kill -TERM "$run"' USR1
wait "$run"
status=$?
while [ -n "$ending" ] && kill -0 "$run" 2>/dev/null; do  # a signal ends `wait`
    wait "$run"
    status=$?
done
if [ -n "$ending" ] && [ ! -e {finished} ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
THREADS = """
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK\""""


@dataclass(frozen=True)
class SlurmJob:
    """A job of Slurm. command: starts the supervisor. out: the run folder. grace_s: seconds between the signal and the
    time limit. options: further flags of sbatch. comment: one line of text."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int | None
    time: str | None
    grace_s: int
    options: Sequence[str]
    comment: str
    out: str
    command: Sequence[str]


def job_script(job: SlurmJob) -> str:
    """The text of the job script."""
    flags = {
        "job-name": Path(job.out).name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_rank,
        "time": job.time,
        "signal": f"B:USR1@{job.grace_s}",
        "open-mode": "append",
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    directives = [f"#SBATCH {flag}" for flag in map(shlex.quote, (*given, "--requeue", *job.options))]
    body = BODY.format(
        path=shlex.quote(str(Path(sys.executable).parent)),
        threads=THREADS if job.cpus_per_rank else "",
        command=shlex.join(job.command),
        finished=shlex.quote(f"{job.out}/{FINISHED}"),
    )
    return "\n".join(["#!/bin/bash", *directives, f"# {job.comment}", *body.split("\n")[1:]])
