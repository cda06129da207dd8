"""From what every rank did last to plain words: who waits for what, and who never came.

Pure functions of what ``trace.py`` wrote: no MPI, no torch in this file.
"""

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from pathlib import PurePath
from typing import Any

Record = dict[str, Any]  # as trace.py writes it
Snapshot = dict[str, Any]

POINT_TO_POINT = ("send", "recv")


class Report:
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
        return self.mismatches + self.waits + silent + self._look_first()

    def _index(self, rank: int, record: Record) -> None:
        name, group = record["operation"], _group_key(record)
        if name in POINT_TO_POINT:
            ends = (rank, record["peer"]) if name == "send" else (record["peer"], rank)
            self._messages[name, group, *ends, record["detail"]].append(record)
        elif name != "monitored_barrier":
            self._collectives[group, record["number"]][rank] = record

    # What does not match

    def _mismatched_collectives(self) -> list[str]:
        """The first collective of each group that its ranks do not agree on; what follows it follows from it."""
        found: dict[Any, str] = {}
        for (group, number), records in sorted(
            self._collectives.items(), key=lambda item: (str(item[0][0]), item[0][1])
        ):
            if group not in found and (line := self._mismatch(group, number, records)):
                found[group] = line
        return list(found.values())

    def _mismatch(self, group: Any, number: int, records: dict[int, Record]) -> str:
        for what in ("operation", "root", "dtype", "size"):
            ranks_by_value = defaultdict(list)
            for rank, record in sorted(records.items()):
                ranks_by_value[_agreed(record, what)].append(rank)
            if len(ranks_by_value) > 1:
                sides = [f"{_ranks(ranks)} {self._called(records[ranks[0]])}" for ranks in ranks_by_value.values()]
                order = " (in another order)" if what == "operation" and self._swapped(group, number, records) else ""
                return f"the {what}s of #{number} in group {_group(next(iter(records.values())))} differ{order}: " + (
                    "; ".join(sides)
                )
        return self._mismatched_sizes(records)

    def _swapped(self, group: Any, number: int, records: dict[int, Record]) -> bool:
        """Does a rank call next what another called now?"""
        names = {record["operation"] for record in records.values()}
        following = self._collectives.get((group, number + 1), {}).values()
        return any(record["operation"] in names for record in following)

    def _mismatched_sizes(self, records: dict[int, Record]) -> str:
        """In an uneven all-to-all, what one rank sends to another must be what that one expects."""
        ranks = next(iter(records.values()))["ranks"]
        for rank, record in records.items():
            for peer, other in records.items():
                if not (record["detail"] and other["detail"]):
                    continue
                sent, expected = record["detail"][0], other["detail"][1]
                if sent and expected and sent[ranks.index(peer)] != expected[ranks.index(rank)]:
                    return (
                        f"the sizes of {_name(record)} differ: rank {rank} sends {sent[ranks.index(peer)]} rows to "
                        f"rank {peer}, {_where(record)}, which expects {expected[ranks.index(rank)]}, {_where(other)}"
                    )
        return ""

    def _mismatched_messages(self) -> list[str]:
        found = []
        for (name, *ends), sends in self._messages.items():
            receives = {record["number"]: record for record in self._messages.get(("recv", *ends), [])}
            for send in sends if name == "send" else []:
                receive = receives.get(send["number"])
                if receive and (_size(send), send["dtype"]) != (_size(receive), receive["dtype"]):
                    _, source, target, _ = ends
                    found.append(
                        f"message #{send['number']} from rank {source} to rank {target} does not match: it was sent as "
                        f"{_tensor(send)}, {_where(send)}, and is expected as {_tensor(receive)}, {_where(receive)}"
                    )
                    break
        return found

    # Who waits

    def _waits(self) -> list[str]:
        waiting: dict[Any, list[int]] = defaultdict(list)
        examples: dict[Any, Record] = {}
        for rank, snapshot in sorted(self._snapshots.items()):
            for record in snapshot["operations"]:
                if record["waited_s"] is not None:
                    alone = rank if record["operation"] in (*POINT_TO_POINT, "monitored_barrier") else None
                    key = (_group_key(record), record["operation"], record["number"], record["peer"], alone)
                    waiting[key].append(rank)
                    examples.setdefault(key, record)
        lines = []
        for key, ranks in waiting.items():
            record = examples[key]
            waits = "wait" if len(ranks) > 1 else "waits"
            lines.append(f"{_ranks(ranks)} {waits} in {self._described(record)}, {_where(record)}")
            lines += self._missing_from(record, ranks)
        return lines

    def _missing_from(self, record: Record, waiting: list[int]) -> list[str]:
        """Why an operation does not end, a line per rank that it needs."""
        if record["operation"] in POINT_TO_POINT:
            return self._missing_message(record, waiting[0])
        entered = self._collectives[_group_key(record), record["number"]]
        lines = []
        for rank in record["ranks"]:
            theirs = entered.get(rank)
            if rank in waiting or (theirs and theirs["finished"]):
                continue
            for waiter in waiting:
                self._awaited[waiter].add(rank)
            if rank in self._silent:
                continue
            if theirs is None:
                lines.append(f"rank {rank} never entered {self._described(record)}; {self._doing(rank)}")
            elif theirs["operation"] == record["operation"]:
                lines.append(f"rank {rank} has entered it, but does not wait for it; {self._doing(rank)}")
        return lines

    def _missing_message(self, record: Record, rank: int) -> list[str]:
        peer = record["peer"]
        if peer is None or peer in self._silent:
            self._awaited[rank].update([peer] if peer is not None else [])
            return [] if peer is not None else [f"no rank has sent what rank {rank} would take from any"]
        group = _group_key(record)
        ends = (rank, peer) if record["operation"] == "send" else (peer, rank)
        wanted, verb = ("recv", "receives") if record["operation"] == "send" else ("send", "sends")
        theirs = self._messages.get((wanted, group, *ends, record["detail"]), [])
        if theirs and theirs[-1]["number"] >= record["number"]:
            return []
        self._awaited[rank].add(peer)
        tags = {key[-1] for key in self._messages if key[:-1] == (wanted, group, *ends)} - {record["detail"]}
        other = f" (but with tag {', '.join(map(str, sorted(tags)))})" if tags else ""
        return [f"rank {peer} never {verb} it{other}; {self._doing(peer)}"]

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

    def _described(self, record: Record) -> str:
        tensor = _tensor(record)
        return f"{_name(record)} (group {_group(record)}{', ' + tensor if tensor else ''})"

    def _called(self, record: Record) -> str:
        root = f" with root {record['peer']}" if record["peer"] is not None else ""
        tensor = _tensor(record)
        return f"called {record['operation']}{root}{' of ' + tensor if tensor else ''}, {_where(record)}"


def _agreed(record: Record, what: str) -> Any:
    """A property that all ranks of a collective must have in common; None where they need not."""
    if what == "root":
        return record["peer"]
    if what == "size":
        return None if record["operation"].startswith("all_to_all") else _size(record)
    return record[what]


def _size(record: Record) -> int | None:
    """Elements; shapes may differ, as [4] and [4, 1] do."""
    return None if record["shape"] is None else prod(record["shape"])


def _group_key(record: Record) -> tuple[str, tuple[int, ...]]:
    return record["group"], tuple(record["ranks"])


def _group(record: Record) -> str:
    return f"{record['description'] or record['group']} of {_ranks(record['ranks'])}".strip()


def _name(record: Record) -> str:
    text = f"{record['operation']} #{record['number']}"
    if record["operation"] in POINT_TO_POINT:
        peer = "any rank" if record["peer"] is None else f"rank {record['peer']}"
        text += f" {'to' if record['operation'] == 'send' else 'from'} {peer}, tag {record['detail']}"
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
