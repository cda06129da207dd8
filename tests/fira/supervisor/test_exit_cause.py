"""Causes found in the output of launchers and of `pipeline.mpi`; the texts were printed by real jobs."""

import signal

import pytest

from fira.supervisor.exit_cause import ExitCause, find_cause

MPICH = """step 10/20 · loss 5.655

===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 23186 RUNNING AT vm
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
This typically refers to a problem with your application.
"""
OPEN_MPI = """--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 23382 on node vm exited on
signal 11 (Segmentation fault).
--------------------------------------------------------------------------
"""
OPEN_MPI_STATUS = """prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-23392@1,1]
   Exit code:    2
"""
HANG = """pipeline: report requested by SIGUSR2
  rank 0 waits in recv
pipeline: rank 0 has waited 600 s in all_to_all_single and ends the job
  ranks 0, 1, 3 wait in all_to_all_single #417
  rank 2 never entered all_to_all_single #417
"""
DEATH = "pipeline: rank 2 (process 77) died without a message; the job ends\n"
KILLED = "pipeline: rank 2 (process 77) was killed by SIGKILL, perhaps because memory ran out; the job ends\n"
RAISED = """rank 1 failed:
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    f()

ZeroDivisionError: division by zero
pipeline: state of the other ranks at the failure
"""
RAISED_IN = """rank 3 failed in step 7, micro-batch 2: RuntimeError: no memory
Traceback (most recent call last):
"""


@pytest.mark.parametrize(
    ("status", "output", "cause"),
    [
        (9, MPICH, ExitCause("SIGKILL ended process 23186 on vm", None, signal.SIGKILL)),
        (139, OPEN_MPI, ExitCause("SIGSEGV ended rank 1", 1, signal.SIGSEGV)),
        (2, OPEN_MPI_STATUS, ExitCause("the launcher ended with status 2")),
        (137, "srun: error: node1: task 3: Killed\n", ExitCause("SIGKILL ended rank 3", 3, signal.SIGKILL)),
        (1, "srun: error: node1: task 3: Exited with exit code 1\n", ExitCause("the launcher ended with status 1")),
        (1, HANG, ExitCause("rank 0 has waited 600 s in all_to_all_single", 0)),
        (1, DEATH, ExitCause("rank 2 (process 77) died without a message", 2)),
        (1, RAISED, ExitCause("rank 1 raised ZeroDivisionError: division by zero", 1)),
        (1, RAISED_IN, ExitCause("rank 3 raised RuntimeError: no memory in step 7, micro-batch 2", 3)),
        (165, OPEN_MPI.replace("11 (Segmentation fault)", "37"), ExitCause("signal 37 ended rank 1", 1, 37)),
        (-9, "", ExitCause("SIGKILL ended the launcher", None, signal.SIGKILL)),
        (0, "step 3/9", ExitCause("the ranks ended with status 0 before the last step")),
        (255, "", ExitCause("the launcher ended with status 255")),
    ],
)
def test_cause(status: int, output: str, cause: ExitCause):
    assert find_cause(status, output) == cause


def test_a_report_of_a_rank_precedes_that_of_the_launcher():
    cause = find_cause(9, KILLED + MPICH)
    assert (cause.rank, cause.signal) == (2, signal.SIGKILL)
    assert "memory" in cause.text
    assert find_cause(9, f"{RAISED}activity: step 7{KILLED}") == cause
    unnamed = find_cause(165, "pipeline: rank 2 (process 77) was killed by signal 37 in step 7; the job ends\n")
    assert (unnamed.rank, unnamed.signal) == (2, 37)
