"""Which rows of a step share one decode call. Pure.

Bits depend on it: in reference mode every sequence is decoded alone, and where llama.cpp would
regroup unequal sequences behind our back (recurrent and hybrid models) only rows of equal
length, in ascending slots, go together, because then its order is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.engine.base import SlotRow


def decode_groups(rows: Sequence[SlotRow], joint: str, capacity: int) -> list[list[int]]:
    """Indices into ``rows``, one list a decode call, every index exactly once.

    ``joint`` is ``StageEngine.joint``; ``capacity`` is the most tokens a call may hold (every
    row's count is at most that, the caller has checked).
    """
    if joint == "none" or len(rows) == 1:
        return [[index] for index in range(len(rows))]
    if joint == "equal":
        buckets: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            buckets.setdefault(row.count, []).append(index)
        ordered = [sorted(b, key=lambda i: rows[i].slot) for b in buckets.values()]
    else:
        ordered = [list(range(len(rows)))]
    groups: list[list[int]] = []
    for bucket in ordered:
        room = 0
        for index in bucket:
            count = rows[index].count
            if room < count:
                groups.append([])
                room = capacity
            groups[-1].append(index)
            room -= count
    return groups
