"""Good plans of many devices: the most promising partial plans, cut by cut. Pure.

What makes a partial plan promising is the bound that the prices give for the rest of its way.
Where no partial plan below ``cutoff`` had to be dropped, the search was complete: then there is
nothing better, and the beam is a proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.planner.cost import Share
from edgellm.planner.pace import Table
from edgellm.planner.prices import Priced
from edgellm.planner.tables import Answer, Limited, Tables

_Ints = NDArray[np.intp]
_Flags = NDArray[np.bool_]


@dataclass(slots=True)
class _Partials:
    """Partial plans that end at one cut."""

    sums: Table
    lasts: _Ints
    used: _Flags
    """[row, device]."""
    hopes: Table
    """The bound of each on all plans that go on from it."""
    before: _Ints
    """The number of the plan that each goes on from; -1: none."""

    def picked(self, rows: _Ints) -> _Partials:
        return _Partials(
            self.sums[rows], self.lasts[rows], self.used[rows], self.hopes[rows], self.before[rows]
        )


def beam(tables: Tables, limited: Limited, priced: Priced, cutoff: float, width: int) -> Answer:
    """The best plan below ``cutoff`` that is found with ``width`` partial plans at each cut.

    ``least`` is ``cutoff``, or the plan's own sum, where nothing had to be dropped.
    """
    return _Beam(tables, limited, priced, cutoff, width).run()


class _Beam:
    def __init__(
        self, tables: Tables, limited: Limited, priced: Priced, cutoff: float, width: int
    ) -> None:
        self._tables = tables
        self._limited = limited
        self._priced = priced
        self._cutoff = cutoff
        self._width = width
        self._complete = True
        self._waiting: list[list[_Partials]] = [[] for _ in range(tables.cuts)]
        self._kept: list[tuple[int, int, int]] = []
        """Of every partial plan that was gone on from: its last device, where that ends, and the
        number of the plan before it."""

    def run(self) -> Answer:
        last_cut = self._tables.cuts - 1
        for cut in range(last_cut):
            now = self._start() if cut == 0 else self._best_at(cut)
            if now is not None:
                self._go_on(now, cut)
        done = self._best_at(last_cut)
        if done is not None:
            wanted = self._tables.wanted
            fine = done.used.sum(axis=1) >= wanted.min_stages
            fine &= done.used[:, sorted(wanted.required)].all(axis=1)
            done = done.picked(np.flatnonzero(fine))
        if done is None or not done.sums.size:
            return Answer(self._cutoff if self._complete else -np.inf, None)
        best = int(np.argmin(done.sums + self._tables.leave[done.lasts]))
        found = self._tables.found(
            self._shares(int(done.lasts[best]), last_cut, int(done.before[best]))
        )
        return Answer(found.total if self._complete else -np.inf, found)

    def _start(self) -> _Partials:
        count = self._tables.count
        return _Partials(
            np.zeros(1),
            np.array([-1]),
            np.zeros((1, count), dtype=bool),
            np.zeros(1),
            np.array([-1]),
        )

    def _best_at(self, cut: int) -> _Partials | None:
        """Those that end here, the most promising first; of the same devices with the same last
        one only the best."""
        groups = self._waiting[cut]
        self._waiting[cut] = []
        if not groups:
            return None
        all_of_them = _Partials(
            np.concatenate([one.sums for one in groups]),
            np.concatenate([one.lasts for one in groups]),
            np.concatenate([one.used for one in groups]),
            np.concatenate([one.hopes for one in groups]),
            np.concatenate([one.before for one in groups]),
        )
        order = np.argsort(all_of_them.hopes, kind="stable")
        keys = np.packbits(all_of_them.used, axis=1)
        seen: set[tuple[int, bytes]] = set()
        rows: list[int] = []
        for row in order:
            key = int(all_of_them.lasts[row]), keys[row].tobytes()
            if key in seen:
                continue
            if len(rows) == self._width:
                self._complete = False
                break
            seen.add(key)
            rows.append(int(row))
        return all_of_them.picked(np.array(rows))

    def _go_on(self, now: _Partials, cut: int) -> None:
        """Every next stage of these."""
        low, high = self._limited.ends[cut]
        if high <= low:
            return
        tables, priced = self._tables, self._priced
        if cut == 0:
            before = tables.enter[None, :].copy()
        else:
            before = now.sums[:, None] + self._limited.links[now.lasts]
        before[now.used] = np.inf
        sums = before[:, None, :] + self._limited.by_cut[cut, low:high][None]
        # What is given back for the devices after: less by the price of the one that is next.
        back = priced.back(now.used)[:, None] - priced.prices[None, :]
        if priced.stage_price:
            missing = np.maximum(0, priced.min_stages - now.used.sum(axis=1))
            back += (priced.stage_price * np.minimum(1, missing))[:, None]
        hopes = sums + priced.rest[None, low:high] - back[:, None, :]
        rows, ends, devices = np.nonzero(hopes < self._cutoff)
        if not rows.size:
            return
        first_number = len(self._kept)
        for row in range(len(now.sums)):
            self._kept.append((int(now.lasts[row]), cut, int(now.before[row])))
        hope, total = hopes[rows, ends, devices], sums[rows, ends, devices]
        for end in range(low, high):
            here = np.flatnonzero(ends == end - low)
            if not here.size:
                continue
            if here.size > 4 * self._width:
                self._complete = False
                few = np.argpartition(hope[here], 4 * self._width)[: 4 * self._width]
                here = here[few]
            used = now.used[rows[here]].copy()
            used[np.arange(here.size), devices[here]] = True
            self._waiting[end].append(
                _Partials(total[here], devices[here], used, hope[here], rows[here] + first_number)
            )

    def _shares(self, last: int, end: int, before: int) -> list[Share]:
        shares = []
        while last >= 0:
            device, first, earlier = self._kept[before]
            shares.append(Share(last, first, end))
            last, end, before = device, first, earlier
        return shares[::-1]
