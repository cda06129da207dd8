"""The channels of a placement, written out by hand."""

from pipeline.messages import Channel, Direction, channels_of
from pipeline.schedule import round_robin, v_shape

F, B = Direction.FORWARD, Direction.BACKWARD


def test_one_stage_per_rank() -> None:
    assert channels_of(round_robin(3), 0) == [Channel(F, 0, 1), Channel(B, 1, 0)]
    assert channels_of(round_robin(3), 1) == [
        Channel(F, 0, 1),
        Channel(F, 1, 2),
        Channel(B, 1, 0),
        Channel(B, 2, 1),
    ]
    assert channels_of(round_robin(1), 0) == []


def test_interleaved_stages_have_channels_from_the_last_rank_to_the_first() -> None:
    assert channels_of(round_robin(3, 2), 0) == [
        Channel(F, 0, 1),
        Channel(F, 2, 0),
        Channel(B, 1, 0),
        Channel(B, 0, 2),
    ]


def test_stages_in_a_v_have_forward_channels_both_ways() -> None:
    assert channels_of(v_shape(2), 1) == [Channel(F, 0, 1), Channel(F, 1, 0), Channel(B, 1, 0), Channel(B, 0, 1)]


def test_name() -> None:
    assert str(Channel(B, 1, 0)) == "backward 1 → 0"
