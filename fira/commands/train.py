"""Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.

Without arguments: a small model on the source of the Python standard library. With --elastic or --max-restarts, and
without mpirun, the command starts the ranks itself and restarts them after a failure.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import pipeline
from fira import cli
from fira.errors import UserError
from fira.training.config import SUPERVISED, TrainConfig
from fira.training.flags import add_deepspeed, add_options, train_config
from fira.training.signals import Signals
from pipeline.mpi.launchers import launched_rank


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    signals = Signals()  # before torch and MPI are imported, which takes seconds
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    parser.add_verbosity()

    options = parser.parse_args(arguments)
    config = train_config(options)
    quiet, verbose = options.quiet, options.verbose
    if options.deepspeed and not launched_rank():
        print(options.deepspeed, file=sys.stderr)
    if not quiet and not launched_rank() and "torch" not in sys.modules:
        print(f"{config.name()}: loading PyTorch and MPI", flush=True)  # which takes seconds
    gc.disable()  # searching the imported modules for garbage would take a tenth of the time of their import
    import torch

    from fira.training.loop import train
    from fira.training.plan_explanation import explain_plan
    from fira.training.run_folder import resumed_settings

    gc.freeze()
    gc.enable()
    supervised = any(getattr(config, name) is not None for name in SUPERVISED)
    world = None if supervised else pipeline.init(config.timeout, cuda=config.device != "cpu")
    cli.start_logging(quiet, verbose, world.rank if world else 0)
    if config.resume:
        parser.set_defaults(**resumed_settings(config))
        config = train_config(parser.parse_args(arguments))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.plan == "explain":
        if world is None:
            raise UserError("--plan explain: each number of ranks has its plan; omit --elastic and use mpirun -np N")
        explain_plan(config, world, quiet)
    elif world:
        train(config, world, signals, quiet)
    else:
        supervise(config, quiet, verbose)


def add_arguments(parser: cli.Parser) -> None:
    add_options(parser)
    add_deepspeed(parser)


def supervise(config: TrainConfig, quiet: bool, verbose: bool) -> None:
    """Start this command on the ranks of a launcher until the run has ended."""
    if launched_rank() is not None:
        raise UserError("--elastic and --max-restarts start the ranks themselves; run the command without mpirun")
    from fira.supervisor.supervise import Supervisor

    program = [sys.executable, sys.argv[0], *(["train"] if Path(sys.argv[0]).name == "fira" else [])]
    flags = [flag for flag, given in (("--quiet", quiet), ("--verbose", verbose)) if given]
    if status := Supervisor(config, program, flags).run():
        sys.exit(status)
