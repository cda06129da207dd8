"""What follows the end of a job."""

import pytest

from fira.supervisor.decision import MAX_DELAY_S, End, Ended, Restart, decide


def status_of(decision: Restart | End) -> int:
    assert isinstance(decision, End)
    return decision.status


def test_a_finished_run_ends_whatever_the_launcher_reports():
    assert status_of(decide(Ended(0, finished=True), 3, 0)) == 0
    assert status_of(decide(Ended(-9, signal=9, finished=True), 3, 0)) == 0


def test_a_user_error_is_never_restarted():
    assert status_of(decide(Ended(2), 0, 100)) == 2
    assert status_of(decide(Ended(2, saved=True), 0, 100)) == 2


@pytest.mark.parametrize("ended", [Ended(2, signal=2), Ended(2, rank=1)])
def test_status_2_of_one_rank_is_no_user_error(ended: Ended):
    assert decide(ended, 0, 3) == Restart(1.0, 1)


@pytest.mark.parametrize("status", [1, 9, 137, -9, 255])
def test_a_failure_after_a_checkpoint_is_restarted_immediately(status: int):
    assert decide(Ended(status, saved=True), 3, 3) == Restart(0.0, 1)


def test_without_progress_the_delay_doubles_up_to_the_limit():
    delays, restarts = [], 0
    while isinstance(following := decide(Ended(1), restarts, 8), Restart):
        delays.append(following.delay_s)
        restarts = following.without_progress
    assert delays == [1, 2, 4, 8, 16, 32, MAX_DELAY_S, MAX_DELAY_S]
    assert following.status == 1
    assert following.reason.startswith("8 restarts without a newer checkpoint")


def test_a_checkpoint_resets_the_count():
    following = decide(Ended(1, saved=True), 2, 2)
    assert following == Restart(0.0, 1)
    assert decide(Ended(1), 1, 2) == Restart(2.0, 2)
    assert status_of(decide(Ended(1), 2, 2)) == 1


def test_no_restart_with_a_limit_of_0():
    assert status_of(decide(Ended(9, signal=9, saved=True), 0, 0)) == 1


def test_a_preemption_is_restarted():
    assert decide(Ended(0, saved=True), 0, 3) == Restart(0.0, 1)


def test_a_change_of_ranks_does_not_count_as_a_failure():
    assert decide(Ended(0, requested=True), 2, 2) == Restart(0.0, 2)
    assert decide(Ended(0, requested=True, saved=True), 2, 2) == Restart(0.0, 0)
