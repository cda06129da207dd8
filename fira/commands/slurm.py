"""Write a job script for Slurm, which trains a model and is requeued before its time limit.

The flags are those of `fira train`. With --hardware, the planner chooses the layout now; without it, the ranks measure
at their start. In the job a supervisor starts the ranks, and restarts them after a failure.
"""

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from fira import cli
from fira.errors import UserError
from fira.training.config import TrainConfig
from fira.training.flags import add_options, given_flags
from fira.value_types import AnyText, PathName, Size, Steps


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    config = TrainConfig(**{field.name: getattr(options, field.name) for field in fields(TrainConfig)})
    script = Path(options.script)
    if script.exists():
        raise UserError(f"--script {script}: exists already; remove it, or give another name")
    from fira.commands.slurm_script import SlurmJob, job_script
    from fira.files import replace as write

    per_node, comment = options.ranks_per_node or 1, "the ranks choose their layout at the start"
    if options.hardware:
        from fira.commands.layout_plan import plan_in_advance

        config, per_node, comment = plan_in_advance(config, options.hardware, options.nodes, options.ranks_per_node)
    config = replace(
        config,
        out=config.out or f"runs/{config.name()}",
        elastic=config.elastic or str(options.nodes * per_node),
        resume=config.resume or "auto",
    )
    job = SlurmJob(
        nodes=options.nodes,
        ranks_per_node=per_node,
        gpus_per_node=options.gpus_per_node if options.gpus_per_node is not None else per_node * bool(options.hardware),
        cpus_per_rank=options.cpus_per_rank,
        time=options.time,
        grace_s=options.grace,
        options=shlex.split(options.sbatch),
        comment=comment,
        out=str(config.out),
        command=[*cli.command_words("train"), *given_flags(config)],
    )
    write(script, job_script(job).encode())
    print(f"{script}: {options.nodes} × {per_node} ranks; {comment}")
    print(f"next: sbatch {shlex.quote(str(script))}")


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
