"""Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.

Without arguments: a small model on the source of the Python standard library.
"""

from collections.abc import Sequence

from fira import cli
from fira.training.signals import Signals


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    signals = Signals()  # before torch and MPI are imported, which takes seconds
    import pipeline
    from fira.training.config import TrainConfig, add_options
    from fira.training.loop import train
    from fira.training.run_folder import resumed_settings

    parser = cli.Parser(__doc__, prog)
    add_options(parser)
    parser.add_verbosity()

    def settings() -> tuple[TrainConfig, bool, bool]:
        values = vars(parser.parse_args(arguments))
        del values["config"]
        quiet, verbose = values.pop("quiet"), values.pop("verbose")
        return TrainConfig(**values), quiet, verbose

    config, quiet, verbose = settings()
    world = pipeline.init(config.timeout, cuda=config.device != "cpu")
    cli.start_logging(quiet, verbose, world.rank)
    if config.resume:
        parser.set_defaults(**resumed_settings(config))
        config, quiet, verbose = settings()
    train(config, world, signals, quiet)
