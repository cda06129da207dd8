"""Execute the programs that nccl_order.py records under NCCL's ordering rules, to find deadlocks without a GPU.

A communicator executes its operations first in, first out, and an operation runs when it is the next one on all of its
ranks. If communicators are created at first use, the first `post` blocks the host until all ranks have come to theirs.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

from tests.integration.nccl_order import Group, Instruction, Operation, Program


def own_communicator(group: Group) -> Hashable:
    """A communicator per process group."""
    return group


class _Rank:
    def __init__(self, number: int, program: Program) -> None:
        self.number, self.program, self.position = number, program, 0
        self.compute: deque[Instruction] = deque()  # the compute stream
        self.enqueued = self.finished = 0  # instructions of the compute stream
        self.communicators: dict[Hashable, list[tuple[Operation, int]]] = defaultdict(list)

    @property
    def instruction(self) -> Instruction | None:
        return self.program[self.position] if self.position < len(self.program) else None


def deadlocks(
    programs: Sequence[Program],
    communicator: Callable[[Group], Hashable] = own_communicator,
    created_at_first_use: bool = False,
) -> bool:
    """Whether the ranks do not come to the end of their programs. communicator: that of a process group."""
    ranks = [_Rank(number, program) for number, program in enumerate(programs)]
    arrived: dict[Hashable, set[int]] = defaultdict(set)  # ranks at the creation of a communicator
    done: set[Operation] = set()

    def host(rank: _Rank) -> bool:
        """Execute instructions of the host until it blocks; whether there was one."""
        start = rank.position
        while (instruction := rank.instruction) is not None:
            kind, operation = instruction
            idle = not rank.compute
            if kind == "post":
                assert operation is not None
                key = communicator(operation.group)
                arrived[key].add(rank.number)
                if created_at_first_use and not set(operation.group.ranks) <= arrived[key]:
                    break
                rank.communicators[key].append((operation, rank.enqueued))
            elif kind in ("wait", "compute"):
                rank.compute.append(instruction)
                rank.enqueued += 1
            elif kind == "device":
                idle = idle and not any(rank.communicators.values())
            if (kind in ("host", "device") and not idle) or kind == "rendezvous":
                break
            rank.position += 1
        return rank.position > start

    def compute(rank: _Rank) -> bool:
        """Execute the compute stream until it waits; whether there was work."""
        start = rank.finished
        while rank.compute and (rank.compute[0].kind == "compute" or rank.compute[0].operation in done):
            rank.compute.popleft()
            rank.finished += 1
        return rank.finished > start

    def transfer(rank: _Rank) -> bool:
        """Execute the operations at the head of this rank's communicators that are at the head on all their ranks."""
        moved = False
        for key, queue in rank.communicators.items():
            while queue and queue[0][0].group.ranks[0] == rank.number:
                operation, _ = queue[0]
                members = [ranks[number] for number in operation.group.ranks]
                heads = [member.communicators[key][:1] for member in members]
                if not all(head and head[0][0] == operation for head in heads):
                    break
                if any(member.finished < head[0][1] for member, head in zip(members, heads, strict=True)):
                    break
                for member in members:
                    del member.communicators[key][0]
                done.add(operation)
                moved = True
        return moved

    while True:
        moved = [step(rank) for rank in ranks for step in (host, compute, transfer)]
        instructions = [rank.instruction for rank in ranks]
        if all(i is not None and i.kind == "rendezvous" for i in instructions) and not any(r.compute for r in ranks):
            for rank in ranks:
                rank.position += 1
        elif not any(moved):
            return any(instructions)
