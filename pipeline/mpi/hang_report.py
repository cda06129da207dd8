"""From what every rank did last to plain words: who waits for what, and who never came.

Pure functions of what ``trace.py`` wrote: no MPI, no torch in this file.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from math import prod
from pathlib import PurePath
from typing import Any

Record = dict[str, Any]  # as trace.py writes it
Snapshot = dict[str, Any]

POINT_TO_POINT = ("send", "recv", "recvAnySource")


class HangReport:
    """What the snapshots of the ranks that answered say.

    Args:
        snapshots: by rank, as ``Trace.as_json`` made them.
        silent: the ranks that did not answer, and why.
    """

    def __init__(self, snapshots: dict[int, Snapshot], silent: dict[int, str]) -> None:
        self._snapshots = snapshots
        self._silent = silent
        self._awaited: dict[int, set[int]] = defaultdict(set)  # rank → the ranks it waits for
        self._collectives: dict[Any, dict[int, Record]] = defaultdict(dict)  # (group, number) → by rank
        self._reached: dict[Any, int] = defaultdict(int)  # (group, rank) → its last collective's number
        self._messages: dict[Any, list[Record]] = defaultdict(list)  # (group, from, to, tag) → in order
        for rank, snapshot in snapshots.items():
            for record in snapshot["operations"]:
                self._index(rank, record)
        self.mismatches = self._mismatched_collectives() + self._mismatched_messages()
        self.waits = self._waits()

    def text(self) -> list[str]:
        """The report, a finding per line: what does not match, who waits, who is silent, where to look first."""
        silent = [f"rank {rank} did not answer: {reason}" for rank, reason in sorted(self._silent.items())]
        if not (self.mismatches or self.waits or silent):
            return ["no rank waits for another"]
        return self.mismatches + self.waits + silent + ([] if self.mismatches else self._look_first())

    def _index(self, rank: int, record: Record) -> None:
        name, group = record["operation"], _group_key(record)
        if name in POINT_TO_POINT:
            ends = ("send", group, rank, record["peer"]) if name == "send" else ("recv", group, record["peer"], rank)
            self._messages[*ends, record["detail"]].append(record)
        elif name != "monitored_barrier":
            self._collectives[group, record["number"]][rank] = record
            self._reached[group, rank] = max(self._reached[group, rank], record["number"])

    # What does not match

    def _mismatched_collectives(self) -> list[str]:
        """The first collective of each group that its ranks do not agree on; what follows it follows from it."""
        found: dict[Any, str] = {}
        for (group, number), records in sorted(self._collectives.items()):
            if group not in found and (line := self._disagreement(records) or _uneven(records)):
                following = self._collectives.get((group, number + 1), {}).values()
                swapped = {r["operation"] for r in records.values()} & {r["operation"] for r in following}
                found[group] = line + (" (the order differs)" if line.startswith("the operations") and swapped else "")
        return list(found.values())

    def _disagreement(self, records: dict[int, Record]) -> str:
        for what, value_of in AGREED.items():
            ranks: dict[Any, list[int]] = defaultdict(list)
            for rank, record in sorted(records.items()):
                if (value := value_of(record)) is not None:
                    ranks[value].append(rank)
            if len(ranks) > 1:
                one = next(iter(records.values()))
                sides = "; ".join(f"{_ranks(some)} called {_call(records[some[0]])}" for some in ranks.values())
                return f"the {what}s of #{one['number']} in group {_group(one)} differ: {sides}"
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

    # Who waits

    def _waits(self) -> list[str]:
        together: dict[Any, dict[int, Record]] = defaultdict(dict)
        for rank, snapshot in sorted(self._snapshots.items()):
            for record in snapshot["operations"]:
                if record["waited_s"] is not None:
                    alone = rank if record["operation"] in (*POINT_TO_POINT, "monitored_barrier") else None
                    together[_group_key(record), record["operation"], record["number"], record["peer"], alone][rank] = (
                        record
                    )
        lines = []
        for waiting in together.values():
            rank, record = next(iter(waiting.items()))
            waits = "waits" if len(waiting) == 1 else "wait"
            lines.append(f"{_ranks(waiting)} {waits} in {_described(record)}, {_where(record)}")
            if record["operation"] in POINT_TO_POINT:
                lines += self._missing_message(rank, record)
            elif record["operation"] != "monitored_barrier":
                lines += self._missing_ranks(set(waiting), record)
        return lines

    def _missing_ranks(self, waiting: set[int], record: Record) -> list[str]:
        """The ranks that a collective waits for, a line for each that answered."""
        group, number = _group_key(record), record["number"]
        lines = []
        for rank in sorted(set(record["ranks"]) - waiting):
            theirs = self._collectives[group, number].get(rank)
            if theirs["finished"] if theirs else self._reached[group, rank] > number:  # the trace forgets in time
                continue
            for waiter in waiting:
                self._awaited[waiter].add(rank)
            if rank in self._silent:
                continue
            if theirs is None:
                lines.append(f"rank {rank} never entered {_described(record)}; {self._doing(rank)}")
            elif theirs["operation"] == record["operation"]:
                lines.append(f"rank {rank} has entered it, but does not wait for it; {self._doing(rank)}")
        return lines

    def _missing_message(self, rank: int, record: Record) -> list[str]:
        """Why a message does not cross."""
        peer, group, tag = record["peer"], _group_key(record), record["detail"]
        if peer is None:
            return []
        if record["operation"] == "recv":
            wanted, never, ends = "send", "sent", (peer, rank)
        else:
            wanted, never, ends = "recv", "took", (rank, peer)
        tags = {key[-1]: records for key, records in self._messages.items() if key[:-1] == (wanted, group, *ends)}
        from_any = self._messages.get((wanted, group, None, peer, tag), [])
        if any(theirs["number"] >= record["number"] for theirs in tags.pop(tag, [])) or from_any:
            return []
        self._awaited[rank].add(peer)
        if peer in self._silent:
            return []
        others = f", only such with tag {', '.join(map(str, sorted(tags)))}" if tags else ""
        return [f"rank {peer} never {never} it{others}; {self._doing(peer)}"]

    def _doing(self, rank: int) -> str:
        """A rank's last operation, and where it is now."""
        snapshot = self._snapshots[rank]
        operations = snapshot["operations"]
        last = max(operations, key=lambda record: record["started"], default=None)
        if last is None:
            text = "it has done no operation yet"
        elif last["waited_s"] is not None:
            text = f"it waits in {_name(last)}, {_where(last)}"
        else:
            ago = snapshot["time"] - (last["finished"] or last["started"])
            state = "finished" if last["finished"] else "started"
            text = f"its last operation was {_name(last)}, {_where(last)}, {state} {ago:.1f} s ago"
        if last is None or last["waited_s"] is None:
            text += f"; it is now at {_short(snapshot['now'])}" if snapshot["now"] else "; its script has ended"
        return text

    def _look_first(self) -> list[str]:
        """The ranks that others wait for and that wait for nobody; or those that wait in a circle."""
        wanted = set().union(*self._awaited.values()) if self._awaited else set()
        idle = sorted(rank for rank in wanted if not self._awaited.get(rank))
        if idle:
            return [f"look first at {_ranks(idle)}"]
        return [f"{_ranks(sorted(wanted))} wait for each other"] if wanted else []


def _uneven(records: dict[int, Record]) -> str:
    """In an uneven all-to-all, what one rank sends to another must be what that one expects."""
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
    """Elements; shapes may differ, as [4] and [4, 1] do."""
    return None if record["shape"] is None else prod(record["shape"])


# What all ranks of a collective must have in common; None where there is nothing to compare
AGREED: dict[str, Callable[[Record], Any]] = {
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
    text = f"{record['operation']} #{record['number']}"
    if record["operation"] in POINT_TO_POINT:
        end = (
            ""
            if record["peer"] is None
            else f" {'to' if record['operation'] == 'send' else 'from'} rank {record['peer']}"
        )
        text += f"{end}, tag {record['detail']}"
    elif record["peer"] is not None:
        text += f" with root {record['peer']}"
    return text


def _tensor(record: Record) -> str:
    if record["shape"] is None:
        return ""
    return f"{'×'.join(map(str, record['shape'])) or 'scalar'} {record['dtype']}"


def _where(record: Record) -> str:
    return _short(record["where"]) if record["where"] else "called from C++"


def _short(place: str) -> str:
    """`train.py:88`: the file without its folder."""
    path, colon, rest = place.partition(":")
    return PurePath(path).name + colon + rest


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 2`, `ranks 0–3, 6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}{', ' if len(run) == 2 else '–'}{run[-1]}" for run in runs]
    return f"{'rank' if parts[0].isdigit() and len(parts) == 1 else 'ranks'} {', '.join(parts)}"
