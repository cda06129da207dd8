"""The injected faults, and what the job must do after each of them."""

import re
from dataclasses import dataclass

PLACES = {  # the place of a fault → what the message must contain
    "start": "in start",
    "training": r"in step 2, backward of stage \d, micro-batch 1",
    "validation": r"in validation of step 2, forward of stage \d, micro-batch \d",
    "saving": "in saving step 2",
    "exit": "",
}
ENDS = {  # a fault of one rank that is possible at any place → what the message must contain
    "killed": r"rank 1 .*was killed by SIGKILL",
    "stopped": r"rank 1 did not answer: its process \d+ is stopped",
    "raising": r"rank 1 failed.*: RuntimeError: injected",
    "sys_exit_0": r"rank 1 has (ended its script|exited with status 0)",
    "sys_exit_3": r"rank 1 exited with status 3",
    "os_exit_0": r"rank 1 .*exited with status 0",
    "os_exit_3": r"rank 1 .*exited with status 3",
    "endless_loop": r"rank 1 never .*in endless_loop",
    "out_of_memory": r"rank 1 failed.*: .*[Mm]emory",
    "segmentation_fault": r"rank 1 .*was killed by SIGSEGV",
}
HARMLESS = {("sys_exit_0", "exit"): 0, ("sys_exit_3", "exit"): 3}  # ordinary ends, with their exit status


@dataclass(frozen=True)
class Case:
    """A fault, where it is injected, on how many ranks, and what is expected.

    status: exit status of the job; None: neither 0 nor 2. message: patterns that its stderr must contain. shards: train
    on shards of tokens instead of text. small_disk: the run folder is a file system of its own.
    """

    fault: str
    place: str
    ranks: int
    status: int | None = None
    message: tuple[str, ...] = ()
    shards: bool = False
    small_disk: bool = False

    @property
    def name(self) -> str:
        return f"{self.fault}-{self.place}-{self.ranks}"

    def missing(self, error: str) -> list[str]:
        """The patterns that stderr does not contain."""
        return [pattern for pattern in self.message if not re.search(pattern, error)]


def _end(fault: str, place: str, ranks: int) -> Case:
    if (fault, place) in HARMLESS:
        status = HARMLESS[fault, place]
        return Case(fault, place, ranks, status, (f"rank 1 exited with status {status}",) if status else ())
    return Case(fault, place, ranks, message=(ENDS[fault], PLACES[place]))


CASES = [
    *(_end(fault, place, 2) for fault in ENDS for place in PLACES),
    *(_end(fault, "training", 4) for fault in ENDS),
    *(
        Case(fault, "training", ranks, message=(pattern, "trainer.py:"))
        for ranks in (2, 4)
        for fault, pattern in [
            ("missing_collective", r"rank 1 never entered all_reduce|the \w+s of #\d+ in group .* differ"),
            ("other_shape", r"the sizes of #\d+ in group default_pg .* differ"),
            ("other_order", r"the operations of #\d+ in group default_pg .* differ"),
        ]
    ),
    *(
        Case("nan_expert", "training", ranks, 2, (r"layers\.\d+\.\S*experts\.\w+\[\d\] is not finite since",))
        for ranks in (2, 4)
    ),
    *(Case("slow", "training", ranks, 0, (r"rank 1 \(stage \d\) is slow",)) for ranks in (2, 4)),
    Case("long", "preparation", 2, 0),
    Case("idle", "preparation", 2, None, (r"rank 0 never entered all_gather", "in start, data preparation")),
    Case("stopped", "preparation", 2, None, (r"rank 0 did not answer: .*in start, data preparation",)),
    Case("killed", "preparation", 2, None, (r"rank 0 .*was killed by SIGKILL .*in start, data preparation",)),
    Case("wrong_data", "start", 2, 2, (r"shards/\S+: token id 60000",), shards=True),
    Case("wrong_data", "training", 2, None, (r"rank 0 failed in step \d.*stage 0",), shards=True),
    Case("truncated_data", "training", 2, None, (r"rank \d .*SIGBUS",), shards=True),
    Case("disk_full", "training", 2, 2, (r"No space left on device",), small_disk=True),
    Case("disk_full", "saving", 2, 2, (r"checkpoint of step 2 failed: .*No space left on device",), small_disk=True),
    Case(
        "read_only",
        "start",
        2,
        2,
        (r"training_log\.csv\S*: Read-only file system; make",),
        small_disk=True,
    ),
    Case("read_only", "saving", 2, 2, (r"checkpoint of step 2 failed: .*Read-only file system",), small_disk=True),
    Case("folder_removed", "saving", 2, 0, (r"run was removed and is written again",)),
]
