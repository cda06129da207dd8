"""Analysis of the ranks' traces: which ranks wait for which operation, and which ranks never began it.

Input are the snapshots that ``trace.py`` writes. This file uses neither MPI nor torch. Terms:

    record      one operation of one rank, as ``Entry.as_json`` returns it
    snapshot    the last records of one rank, its stacks and the time, as ``Trace.as_json`` returns them
    group key   (name, global ranks) of a process group
    number      position of a collective in its group, or of a message between two ranks with one tag, from 1
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from math import prod
from pathlib import PurePath
from typing import Any

Record = dict[str, Any]
Snapshot = dict[str, Any]

MESSAGES = ("send", "recv", "recvAnySource")
EXIT = "exit"  # the operation of a rank that has left its script and waits for the others


class HangReport:
    """Mismatches and waits in the snapshots of the ranks.

    Args:
        snapshots: snapshot of every rank that answered.
        silent: reason for every rank that did not answer.

    Attributes:
        mismatches: one line per operation that differs between ranks.
        waits: the lines that describe the waiting ranks and the ranks that they wait for.
        never_began: for each waiting rank, the ranks that answered and never began the operation it waits for.
    """

    def __init__(self, snapshots: dict[int, Snapshot], silent: dict[int, str]) -> None:
        self._snapshots = snapshots
        self._silent = silent
        self.never_began: dict[int, set[int]] = defaultdict(set)
        self._awaited: dict[int, set[int]] = defaultdict(set)  # rank → the ranks it waits for
        self._collectives: dict[Any, dict[int, Record]] = defaultdict(dict)  # (group key, number) → record by rank
        self._reached: dict[Any, int] = defaultdict(int)  # (group key, rank) → number of its last collective
        self._messages: dict[Any, list[Record]] = defaultdict(list)  # (name, group key, source, target, tag) → records
        for rank, snapshot in snapshots.items():
            for record in snapshot["operations"]:
                self._index(rank, record)
        self.mismatches = self._mismatched_collectives() + self._mismatched_messages()
        self.waits = self._waits()

    def text(self) -> list[str]:
        """Return the lines of the report: mismatches, waiting ranks, silent ranks, and the ranks to look at first."""
        silent = [f"rank {rank} did not answer: {reason}" for rank, reason in sorted(self._silent.items())]
        if not (self.mismatches or self.waits or silent):
            return ["no rank waits for another"]
        return self.mismatches + self.waits + silent + ([] if self.mismatches else self._look_first())

    def _index(self, rank: int, record: Record) -> None:
        name, group = record["operation"], _group_key(record)
        if name in MESSAGES:
            ends = ("send", group, rank, record["peer"]) if name == "send" else ("recv", group, record["peer"], rank)
            self._messages[*ends, record["detail"]].append(record)
        elif name != "monitored_barrier":
            self._collectives[group, record["number"]][rank] = record
            self._reached[group, rank] = max(self._reached[group, rank], record["number"])

    # Mismatches

    def _mismatched_collectives(self) -> list[str]:
        """Describe the first mismatched collective of each group; later mismatches are consequences of it."""
        found: dict[Any, str] = {}
        for (group, number), records in sorted(self._collectives.items()):
            if group not in found and (line := self._disagreement(records) or _mismatched_sizes(records)):
                following = self._collectives.get((group, number + 1), {}).values()
                swapped = {r["operation"] for r in records.values()} & {r["operation"] for r in following}
                found[group] = line + (" (the order differs)" if line.startswith("the operations") and swapped else "")
        return list(found.values())

    def _disagreement(self, records: dict[int, Record]) -> str:
        for attribute, value_of in EQUAL_ON_ALL_RANKS.items():
            ranks: dict[Any, list[int]] = defaultdict(list)
            for rank, record in sorted(records.items()):
                if (value := value_of(record)) is not None:
                    ranks[value].append(rank)
            if len(ranks) > 1:
                record = next(iter(records.values()))
                calls = "; ".join(
                    f"{_ranks(callers)} called {_call(records[callers[0]])}" for callers in ranks.values()
                )
                return f"the {attribute}s of #{record['number']} in group {_group(record)} differ: {calls}"
        return ""

    def _mismatched_messages(self) -> list[str]:
        found = []
        for (name, *ends), sends in self._messages.items():
            if name != "send":
                continue
            receives = {receive["number"]: receive for receive in self._messages.get(("recv", *ends), [])}
            for send in sends:
                receive = receives.get(send["number"])
                if receive and (_size(send), send["dtype"]) != (_size(receive), receive["dtype"]):
                    found.append(
                        f"message #{send['number']} from rank {ends[1]} to rank {ends[2]} is sent as {_tensor(send)}, "
                        f"{_where(send)}, and expected as {_tensor(receive)}, {_where(receive)}"
                    )
                    break
        return found

    # Waits

    def _waits(self) -> list[str]:
        """Describe the operations that ranks wait for, one group of lines for all ranks that wait for the same one."""
        waiting_by_operation: dict[Any, dict[int, Record]] = defaultdict(dict)
        for rank, snapshot in sorted(self._snapshots.items()):
            for record in snapshot["operations"]:
                if record["waited_s"] is not None:
                    single = rank if record["operation"] in (*MESSAGES, "monitored_barrier") else None
                    operation = _group_key(record), record["operation"], record["number"], record["peer"], single
                    waiting_by_operation[operation][rank] = record
        if len(waiting_by_operation) > 1:  # the lines of the others name the ranks that have left
            waiting_by_operation = {key: waiting for key, waiting in waiting_by_operation.items() if key[1] != EXIT}
        lines = []
        for waiting in waiting_by_operation.values():
            rank, record = next(iter(waiting.items()))
            verb = "waits" if len(waiting) == 1 else "wait"
            activities = {self._snapshots[rank]["activity"] for rank in waiting}
            during = f", in {activities.pop()}" if len(activities) == 1 and any(activities) else ""
            lines.append(f"{_ranks(waiting)} {verb} in {_described(record)}, {_where(record)}{during}")
            if record["operation"] in MESSAGES:
                lines += self._missing_message(rank, record)
            elif record["operation"] != "monitored_barrier":
                lines += self._missing_ranks(set(waiting), record)
        return lines

    def _missing_ranks(self, waiting: set[int], record: Record) -> list[str]:
        """Describe each rank that answered and that a collective waits for."""
        group, number = _group_key(record), record["number"]
        lines = []
        for rank in sorted(set(record["ranks"]) - waiting):
            other = self._collectives[group, number].get(rank)
            if other["finished"] if other else self._reached[group, rank] > number:  # no longer in the trace
                continue
            for waiter in waiting:
                self._awaited[waiter].add(rank)
            if rank in self._silent:
                continue
            if other is None:
                for waiter in waiting:
                    self.never_began[waiter].add(rank)
                lines.append(f"rank {rank} never entered {_described(record)}; {self._state(rank)}")
            elif other["operation"] == record["operation"]:
                lines.append(f"rank {rank} has entered it, but does not wait for it; {self._state(rank)}")
        return lines

    def _missing_message(self, rank: int, record: Record) -> list[str]:
        """Describe the other end of a message if it never began to send or receive it."""
        peer, group, tag = record["peer"], _group_key(record), record["detail"]
        if peer is None:
            return []
        if record["operation"] == "recv":
            counterpart, verb, ends = "send", "sent", (peer, rank)
        else:
            counterpart, verb, ends = "recv", "received", (rank, peer)
        tags = {key[-1]: records for key, records in self._messages.items() if key[:-1] == (counterpart, group, *ends)}
        from_any = self._messages.get((counterpart, group, None, peer, tag), [])
        if any(other["number"] >= record["number"] for other in tags.pop(tag, [])) or from_any:
            return []
        self._awaited[rank].add(peer)
        if peer in self._silent:
            return []
        self.never_began[rank].add(peer)
        other_tags = f", only messages with tag {', '.join(map(str, sorted(tags)))}" if tags else ""
        return [f"rank {peer} never {verb} it{other_tags}; {self._state(peer)}"]

    def _state(self, rank: int) -> str:
        """Describe a rank's last operation and the line that it executes now."""
        snapshot = self._snapshots[rank]
        now = f"it is now at {_short(snapshot['now'])}" if snapshot["now"] else "its script has ended"
        now += f", in {snapshot['activity']}" if snapshot["activity"] else ""
        operations = [record for record in snapshot["operations"] if record["operation"] != EXIT]
        last = max(operations, key=lambda record: record["started"], default=None)
        if last is None:
            return f"it has not begun any operation yet; {now}"
        if last["waited_s"] is not None:
            return f"it waits in {_name(last)}, {_where(last)}"
        ago = snapshot["time"] - (last["finished"] or last["started"])
        state = "finished" if last["finished"] else "started"
        return f"its last operation was {_name(last)}, {_where(last)}, {state} {ago:.1f} s ago; {now}"

    def _look_first(self) -> list[str]:
        """Name the ranks that others wait for and that wait for no rank themselves, or those that form a cycle."""
        awaited = set().union(*self._awaited.values()) if self._awaited else set()
        idle = sorted(rank for rank in awaited if not self._awaited.get(rank))
        if idle:
            return [f"look first at {_ranks(idle)}"]
        return [f"{_ranks(sorted(awaited))} wait for each other"] if awaited else []


def _mismatched_sizes(records: dict[int, Record]) -> str:
    """Describe the first pair of ranks of an uneven all-to-all whose sent and expected rows differ, if any."""
    exchanges = {rank: record for rank, record in records.items() if record["detail"] and all(record["detail"])}
    for rank, record in exchanges.items():
        for peer, other in exchanges.items():
            sent = record["detail"][0][record["ranks"].index(peer)]
            expected = other["detail"][1][other["ranks"].index(rank)]
            if sent != expected:
                return (
                    f"the sizes of {_name(record)} differ: rank {rank} sends {sent} rows to rank {peer}, "
                    f"{_where(record)}, which expects {expected}, {_where(other)}"
                )
    return ""


def _size(record: Record) -> int | None:
    """Number of elements. Shapes may differ as [4] and [4, 1] do."""
    return None if record["shape"] is None else prod(record["shape"])


# What must be equal on all ranks of a collective; None is not compared
EQUAL_ON_ALL_RANKS: dict[str, Callable[[Record], Any]] = {
    "operation": lambda record: record["operation"],
    "root": lambda record: record["peer"],
    "dtype": lambda record: record["dtype"],
    "size": lambda record: None if record["operation"].startswith("all_to_all") else _size(record),
}


def _group_key(record: Record) -> tuple[str, tuple[int, ...]]:
    return record["group"], tuple(record["ranks"])


def _group(record: Record) -> str:
    return f"{record['description'] or record['group']} of {_ranks(record['ranks'])}".strip()


def _described(record: Record) -> str:
    return f"{_name(record)} (group {_group(record)}{'; ' if record['shape'] is not None else ''}{_tensor(record)})"


def _call(record: Record) -> str:
    root = "" if record["peer"] is None else f" with root {record['peer']}"
    return (
        f"{record['operation']}{root}{' of ' if record['shape'] is not None else ''}{_tensor(record)}, {_where(record)}"
    )


def _name(record: Record) -> str:
    relation = {"send": "to rank", "recv": "from rank"}.get(record["operation"], "with root")
    peer = "" if record["peer"] is None else f" {relation} {record['peer']}"
    tag = f", tag {record['detail']}" if record["operation"] in MESSAGES else ""
    return f"{record['operation']} #{record['number']}{peer}{tag}"


def _tensor(record: Record) -> str:
    if record["shape"] is None:
        return ""
    return f"{'×'.join(map(str, record['shape'])) or 'scalar'} {record['dtype']}"


def _where(record: Record) -> str:
    if record["operation"] == EXIT:
        return "at the end of the script"
    return _short(record["where"]) if record["where"] else "called from C++"


def _short(place: str) -> str:
    """Strip the folder: ``train.py:88``."""
    path, colon, rest = place.partition(":")
    return PurePath(path).name + colon + rest


def _ranks(ranks: Iterable[int]) -> str:
    """Format ranks: ``rank 2``, ``ranks 0–3, 6``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}{', ' if len(run) == 2 else '–'}{run[-1]}" for run in runs]
    return f"{'rank' if parts[0].isdigit() and len(parts) == 1 else 'ranks'} {', '.join(parts)}"
