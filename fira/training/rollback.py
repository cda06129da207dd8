"""Continue after a numerical fault from the last checkpoint, without the sequences read since."""

import logging

from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.writer import CheckpointWriter
from fira.training import state
from fira.training.numerical_faults import NumericalFault
from fira.training.setup import Run

LIMIT = 3  # rollbacks to the same checkpoint
logger = logging.getLogger(__name__)


def settle(writer: CheckpointWriter, step: int) -> None:
    """Complete or abandon the save in progress after a fault in `step` (collective).

    A checkpoint of the previous step is abandoned, because its weights may be the cause.
    """
    if writer.step == step - 1:
        writer.discard()
    else:
        writer.finish()


def roll_back(fault: NumericalFault, step: int, run: Run, writer: CheckpointWriter) -> int:
    """Restore the last checkpoint, skip all sequences read since, and return its step (collective).

    step: in which the fault occurred. Everything that follows is a function of the checkpoint and of the position in
    the data, which the next checkpoint contains. Raises the fault if there is no checkpoint to return to, or if
    LIMIT rollbacks to it have not helped.
    """
    if writer.last is None:
        raise fault
    history, consumed = run.trainer.history, run.loader.consumed
    rollbacks = history.rollbacks
    saved = Checkpoint.open(writer.last)
    if sum(earlier["restored"] == saved.step for earlier in rollbacks) == LIMIT:
        raise NumericalFault(f"{fault}; {LIMIT} rollbacks to the checkpoint of step {saved.step} did not help")
    restored = state.restore(saved, run.trainer, run.loader, run.tokenizer)
    skipped = {"first": run.loader.consumed, "end": consumed}
    history.rollbacks = [*rollbacks, {"step": step, "restored": restored, **skipped}]
    run.loader.consumed = consumed
    if run.trainer.mesh.rank == 0:
        logger.warning(
            "step %d: %s; rolled back to step %d, sequences %d to %d are skipped",
            *(step, fault, restored, skipped["first"], consumed - 1),
        )
    return restored
