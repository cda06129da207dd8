"""Write a job script for Slurm, which trains a model and is requeued before its time limit.

The flags are those of `fira train`. With --hardware, the planner chooses the layout now; without it, the ranks measure
at their start. In the job a supervisor starts the ranks, and restarts them after a failure.
"""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fira import cli
from fira.errors import UserError
from fira.training.config import TrainConfig
from fira.training.flags import add_options, given_flags, train_config
from fira.value_types import AnyText, PathName, Size, Steps


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    config = train_config(options)
    script = Path(options.script)
    if script.exists():
        raise UserError(f"--script {script}: exists already; remove it, or give another name")
    check_job(config, options)
    from fira.commands.slurm_script import SlurmJob, job_script
    from fira.files import replace as write
    from fira.training.run_folder import new_folder

    per_node, comment = options.ranks_per_node or 1, "the ranks choose their layout at the start"
    if options.hardware:
        from fira.commands.layout_plan import plan_in_advance

        config, per_node, comment = plan_in_advance(config, options.hardware, options.nodes, options.ranks_per_node)
    config = replace(
        config,
        out=config.out or str(new_folder(config.name())),
        elastic=config.elastic or str(options.nodes * per_node),
        resume="auto",
    )
    job = SlurmJob(
        nodes=options.nodes,
        ranks_per_node=per_node,
        gpus_per_node=options.gpus_per_node if options.gpus_per_node is not None else per_node * bool(options.hardware),
        cpus_per_rank=options.cpus_per_rank,
        time=options.time,
        grace_s=options.grace,
        options=words(options.sbatch),
        comment=comment,
        out=str(config.out),
        command=[*cli.command_words("train"), *given_flags(config)],
    )
    write(script, job_script(job).encode())
    print(f"{script}: {options.nodes} × {per_node} ranks; {comment}")
    print(f"next: sbatch {shlex.quote(str(script))}")


def check_job(config: TrainConfig, options: Namespace) -> None:
    """Raise UserError for settings with which the job would not continue, or would never get to a checkpoint."""
    if config.resume and (config.resume != "auto" or not config.out):
        raise UserError(
            f"--resume {config.resume}: a job continues from the newest checkpoint in --out; "
            "give its run folder as --out, and --resume auto"
        )
    seconds = time_limit(options.time) if options.time else None
    if seconds is not None and seconds <= options.grace:
        raise UserError(f"--time {options.time}: not longer than --grace, {options.grace} s; change one of them")
    folder = Path(options.script).parent
    if not folder.is_dir():
        raise UserError(f"--script {options.script}: there is no folder {folder}; create it")


def time_limit(text: str) -> float | None:
    """Seconds of a time as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for others, as UNLIMITED."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        given = int(days) if days else 0
    except ValueError:
        return None
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts)}.get(len(parts), (*parts, 0, 0))[:3]
    return ((given * 24 + hours) * 60 + minutes) * 60 + seconds


def words(text: str) -> list[str]:
    """Split flags as a shell does. Raises UserError for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--sbatch {text}: {error}; close the quote") from None


def add_arguments(parser: cli.Parser) -> None:
    add_options(parser)
    parser.add_argument("--nodes", type=Size, required=True, help="number of nodes")
    parser.add_argument(
        "--ranks-per-node", type=Size, help="ranks of a node, usually its GPUs; default: those of --hardware, or 1"
    )
    parser.add_argument(
        "--hardware", type=PathName, help="h200, h100, a100, t4 or a TOML file, for which the layout is planned"
    )
    parser.add_argument("--gpus-per-node", type=Steps, help="default: one for each rank with --hardware, else none")
    parser.add_argument("--cpus-per-rank", type=Size, help="CPU cores of each rank; default: that of the cluster")
    parser.add_argument("--time", type=str, help="time limit, as in 24:00:00; default: that of the partition")
    parser.add_argument(
        "--grace", type=Size, default=300, help="seconds before the time limit to save in (default: %(default)s)"
    )
    parser.add_argument(
        "--sbatch",
        type=AnyText,
        default="",
        help='further flags of sbatch, as in --sbatch="--partition=gpu --account=me"',
    )
    parser.add_argument(
        "--script", type=PathName, default="train.sbatch", help="the file to write (default: %(default)s)"
    )
