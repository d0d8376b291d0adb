"""The best plan under some limits, exactly: every choice of devices in every order. Pure.

Dynamic programming over (devices in use, last device, next cut), one size of set after the
other. What cannot become better than ``cutoff``, by the prices' bound on the rest of the way, is
not followed further: that leaves few states of the many.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm.planner.cost import Share
from edgellm.planner.pace import Table
from edgellm.planner.prices import Priced
from edgellm.planner.tables import Answer, Limited, Tables

_Ints = NDArray[np.intp]


class EveryOrder:
    """All devices of ``tables`` in every order: at most 2^n * n steps of one device each."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        count = tables.count
        sets = np.arange(1 << count)
        self._sizes = np.array([int(one).bit_count() for one in sets])
        must = sum(1 << device for device in tables.wanted.required)
        self._goals = np.flatnonzero(
            (self._sizes >= tables.wanted.min_stages) & (sets & must == must) & (sets > 0)
        )
        self._levels: list[tuple[_Ints, _Ints]] = []
        for size in range(1, count + 1):
            of_size = np.flatnonzero(self._sizes == size)
            holds = (of_size[:, None] >> np.arange(count)) & 1
            rows, lasts = np.nonzero(holds)
            self._levels.append((of_size[rows], lasts))

    def solve(self, limited: Limited, cutoff: float, priced: Priced | None) -> Answer:
        """The smallest sum that is below ``cutoff``."""
        tables = self._tables
        count, cuts = tables.count, tables.cuts
        # reached[set, last, cut]: the smallest sum of these devices up to this cut.
        reached = np.full((1 << count, count, cuts), np.inf)
        alive = np.zeros(1 << count, dtype=bool)
        alive[0] = True
        for all_sets, all_lasts in self._levels:
            going = alive[all_sets ^ (1 << all_lasts)]
            sets, lasts = all_sets[going], all_lasts[going]
            if not sets.size:
                break
            rests = sets ^ (1 << lasts)
            if rests[0] == 0:
                before = np.full((len(sets), cuts), np.inf)
                before[:, 0] = tables.enter[lasts]
            else:
                before = self._before(reached, limited, rests, lasts)
            now = self._over(before, limited, lasts)
            if np.isfinite(cutoff):
                togo = 0.0 if priced is None else priced.togo(sets, lasts)
                now[now + togo > cutoff] = np.inf
            reached[sets, lasts] = now
            alive[sets[np.isfinite(now).any(axis=1)]] = True
        return self._best(reached, limited)

    def _before(self, reached: Table, limited: Limited, rests: _Ints, lasts: _Ints) -> Table:
        """[row, cut]: the smallest sum of the devices ``rests`` up to a cut, and on to a last."""
        before = np.full((len(rests), reached.shape[2]), np.inf)
        for sender in range(reached.shape[1]):
            came = reached[rests, sender] + limited.links[sender, lasts][:, None]
            np.minimum(before, came, out=before)
        return before

    def _over(self, before: Table, limited: Limited, lasts: _Ints) -> Table:
        """[row, cut]: ``before``, and a stage on a last device."""
        now = np.full_like(before, np.inf)
        by_first = limited.stages.transpose(1, 0, 2)
        for first, (low, high) in enumerate(limited.ends):
            column = before[:, first]
            rows = np.flatnonzero(np.isfinite(column))
            if high <= low or not rows.size:
                continue
            sums = by_first[first, lasts[rows], low:high]
            sums += column[rows, None]
            if rows.size == len(lasts):
                np.minimum(now[:, low:high], sums, out=now[:, low:high])
            else:
                now[rows, low:high] = np.minimum(now[rows, low:high], sums)
        return now

    def _best(self, reached: Table, limited: Limited) -> Answer:
        tables, count = self._tables, self._tables.count
        if not self._goals.size:
            return Answer(np.inf, None)
        ends = reached[self._goals, :, -1] + tables.leave[None, :]
        goal, last = divmod(int(np.argmin(ends[:, ::-1])), count)
        chosen, last = int(self._goals[goal]), count - 1 - last  # of equals, the given order
        total = float(ends[goal, last])
        if not np.isfinite(total):
            return Answer(np.inf, None)
        shares: list[Share] = []
        end = tables.cuts - 1
        while chosen:
            rest = chosen ^ 1 << last
            one = np.array([last])
            if rest:
                before = self._before(reached, limited, np.array([rest]), one)[0]
            else:
                before = np.full(tables.cuts, np.inf)
                before[0] = tables.enter[last]
            first = int(np.argmin(before + limited.stages[last, :, end]))
            shares.append(Share(last, first, end))
            if rest:
                ways = reached[rest, :, first] + limited.links[:, last]
                last = count - 1 - int(np.argmin(ways[::-1]))
            chosen, end = rest, first
        return Answer(total, tables.found(shares[::-1]))
