"""TensorBoard's own reader reads what was tracked."""

from pathlib import Path

import pytest

from tests.fira.metrics.tracked_run import EXPERTS, LOSSES, track

pytest.importorskip("tensorboard")

from fira.metrics.tensorboard_tracker import TensorBoardTracker


def test_numbers_texts_and_pictures_are_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track("tensorboard", tmp_path / "run") == [f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    numbers = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert numbers["train_loss"] == LOSSES
    assert len(events.Scalars("train_loss")) == 4  # step 3 once, although it was repeated
    assert numbers["val_loss"] == {0: 7.5, 2: 3.5}
    assert {name: numbers[name][4] for name in EXPERTS} == EXPERTS
    texts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert texts["samples/prompt_1/text_summary"] == ["    def main\n"]
    assert "| lr | 0.006 |" in texts["settings/text_summary"][0]
    assert "| steps | 5 |" in texts["settings/text_summary"][-1]
    (picture,) = events.Images("training_progress")
    assert (picture.step, picture.width, picture.height) == (4, 4, 3)


def test_steps_before_the_first_checkpoint_are_shown_once(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint begins again in the same folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last in (3, 2):
        tracker = TensorBoardTracker(tmp_path, "run", {}, 1)
        for step in range(last):
            tracker.numbers(step, {"loss": 10.0 * last + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 20), (1, 21)]
