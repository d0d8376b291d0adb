"""The best plan under some limits whose devices come in one given order. Pure.

Any device may be left out but the required ones. Exact for that order: the start, and the last
polish, of a search over more devices than all orders could be tried of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm.planner.cost import Share
from edgellm.planner.pace import Table
from edgellm.planner.tables import Found, Limited, Tables


def best_in_order(tables: Tables, limited: Limited, order: Sequence[int]) -> Found | None:
    """The smallest sum of the devices in this order; None where nothing fits."""
    return _InOrder(tables, limited, order).solve()


def polished(tables: Tables, limited: Limited, found: Found) -> Found:
    """The plan made better as long as that goes: the best is taken that has its order, with the
    other devices between."""
    while True:
        better = best_in_order(tables, limited, order_around(tables, limited, found))
        if better is None or better.total >= found.total - 1e-9 * abs(found.total):
            return found
        found = better


def reordered(tables: Tables, limited: Limited, found: Found, most: int) -> Found:
    """The plan made better by moving one of its devices to another place, or another device into
    the place of one, as long as that goes; ``most`` orders are tried."""
    tried = 0
    while True:
        order = [share.device for share in found.shares]
        others = [device for device in range(tables.count) if device not in order]
        moved = []
        for at in range(len(order)):
            rest = order[:at] + order[at + 1 :]
            moved += [[*rest[:to], order[at], *rest[to:]] for to in range(len(order)) if to != at]
        for at in range(len(order)):
            moved += [[*order[:at], other, *order[at + 1 :]] for other in others]
        for each in moved:
            if tried >= most:
                return found
            tried += 1
            better = best_in_order(tables, limited, each)
            if better is not None and better.total < found.total - 1e-7 * abs(found.total):
                found = polished(tables, limited, better)
                break
        else:
            return found


def order_around(tables: Tables, limited: Limited, found: Found) -> list[int]:
    """A plan's devices in its order, and the others between them, each where the links from and
    to its neighbours cost the least."""
    order = [share.device for share in found.shares]
    into = np.vstack([tables.enter, limited.links[order]])
    onward = np.vstack([limited.links[:, order].T, tables.leave])
    places = (into + onward).argmin(axis=0)
    for device in sorted(set(range(tables.count)) - set(order), key=lambda one: -places[one]):
        order.insert(int(places[device]), device)
    return order


class _InOrder:
    def __init__(self, tables: Tables, limited: Limited, order: Sequence[int]) -> None:
        self._tables = tables
        self._limited = limited
        self._order = list(order)
        # The last required device before each place: nothing earlier may come right before it.
        self._since: list[int] = []
        since = 0
        self._must_begin = len(order)
        for place, device in enumerate(order):
            self._since.append(since)
            if device in tables.wanted.required:
                since = place
                self._must_begin = min(self._must_begin, place)
        self._must_end = since if tables.wanted.required else 0
        self._most = max(1, tables.wanted.min_stages)

    def solve(self) -> Found | None:
        tables, order, stages = self._tables, self._order, self._limited.stages
        if not tables.wanted.required <= set(order):
            return None
        most = self._most
        # reached[k, place, cut]: the smallest sum with the last stage at this place of the order
        # and k stages so far; k stops counting at as many as are asked for.
        reached = np.full((most + 1, len(order), tables.cuts), np.inf)
        for place, device in enumerate(order):
            for stage in range(1, most + 1):
                before = self._before(reached, stage, place)
                if np.isfinite(before).any():
                    reached[stage, place] = (before[:, None] + stages[device]).min(axis=0)
        ends = reached[most, self._must_end :, -1] + tables.leave[order[self._must_end :]]
        place = int(np.argmin(ends)) + self._must_end
        if not np.isfinite(ends[place - self._must_end]):
            return None
        shares: list[Share] = []
        stage, end = most, tables.cuts - 1
        while True:
            device = order[place]
            before = self._before(reached, stage, place)
            first = int(np.argmin(before + stages[device, :, end]))
            shares.append(Share(device, first, end))
            if first == 0:
                return tables.found(shares[::-1])
            ways = self._ways(reached, stage, place)[:, :, first]
            which, back = divmod(int(np.argmin(ways)), ways.shape[1])
            stage, place = self._counts(stage)[which], self._since[place] + back
            end = first

    def _counts(self, stage: int) -> list[int]:
        """How many stages there may have been before the ``stage``-th."""
        return [stage - 1, self._most] if stage == self._most else [stage - 1]

    def _ways(self, reached: Table, stage: int, place: int) -> Table:
        """[count before, place before, cut]: the sums up to a cut and on to this place."""
        device, since = self._order[place], self._since[place]
        hops = self._limited.links[self._order[since:place], device]
        ways: Table = reached[self._counts(stage), since:place] + hops[None, :, None]
        return ways

    def _before(self, reached: Table, stage: int, place: int) -> Table:
        """[cut]: the smallest sum before the ``stage``-th stage at ``place``."""
        before = np.full(reached.shape[2], np.inf)
        if stage == 1 and place <= self._must_begin:
            before[0] = self._tables.enter[self._order[place]]
        if place > self._since[place]:
            before = np.minimum(before, self._ways(reached, stage, place).min(axis=(0, 1)))
        return before
