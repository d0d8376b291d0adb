"""Search: which devices, in which order, with which spans. Exact for what it promises. Pure.

``Partition`` is the seam behind which another policy can take its place: it gets a ``CostModel``
and what is asked for, and answers with shares that fit, or None.

What is minimised is the time of the workload's request: a sum over stages and links, S, plus
``waves`` times the slowest of them, B. For a bound on B, the smallest S is found by dynamic
programming over (devices in use, last device, next cut): in every order for up to ``FREE_ORDER``
devices; with more, in the order they are given and in that of their speed, any left out. Over the
bounds goes a branch and bound: S grows as the bound falls, so that S at an interval's upper end
plus ``waves`` times its lower one is the least that anything in between can cost.

Requests that differ by less than the tie-breakers are the same: then fewer stages win, then even
shares of memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm.planner.cost import CostModel, Share, Table

FREE_ORDER = 6
_STAGE_TIE_S = 1e-6
_LOAD_TIE_S = 1e-7
"""Times the square of the share of a device's memory."""
_PROVEN = 1e-9
"""The answer is the best up to this part of it: rounding, no more."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a plan, beside being fast."""

    min_stages: int = 1
    required: frozenset[int] = frozenset()
    """Devices, by their index, that must have a stage."""


Partition = Callable[[CostModel, Wanted], tuple[Share, ...] | None]


@dataclass(frozen=True, slots=True)
class _Found:
    """The smallest sum under a bound: its shares, and the slowest stage or link of them."""

    total: float
    slowest: float
    shares: tuple[Share, ...]


class _Solver(Protocol):
    """The smallest sum of any plan none of whose stages and links is slower than ``bound``."""

    def solve(self, bound: float) -> _Found | None: ...


def partition_by_speed(cost: CostModel, wanted: Wanted) -> tuple[Share, ...] | None:
    """The fastest plan for the cost model's workload; None where nothing fits."""
    count = len(cost.offers)
    if len(wanted.required) > count or wanted.min_stages > count:
        return None
    solvers: list[_Solver]
    if count <= FREE_ORDER:
        solvers = [_AnyOrder(cost, wanted)]
    else:
        given = list(range(count))
        by_speed = sorted(given, key=lambda device: -cost.speeds[device].decode_bytes_per_s)
        orders = [given] if by_speed == given else [given, by_speed]
        solvers = [_InOrder(cost, wanted, order) for order in orders]
    bounds = np.unique(np.concatenate([cost.stage_streams.ravel(), cost.link_streams.ravel()]))
    bounds = bounds[np.isfinite(bounds)]
    best: _Found | None = None
    for solver in solvers:
        best = _descend(solver, bounds, cost.waves, best)
    return None if best is None else best.shares


def _descend(solver: _Solver, bounds: Table, waves: int, best: _Found | None) -> _Found | None:
    """The best over all bounds, and ``best``. ``bounds`` are all that B can be, ascending."""

    def value(found: _Found) -> float:
        return found.total + waves * found.slowest

    def below(found: _Found) -> int:
        """The last bound under which ``found`` is no longer possible."""
        return int(np.searchsorted(bounds, found.slowest)) - 1

    def push(low: int, high: int, total: float) -> None:
        if low <= high:
            heapq.heappush(queue, (total + waves * float(bounds[low]), low, high, total))

    queue: list[tuple[float, int, int, float]] = []
    first = solver.solve(np.inf)
    if first is None:
        return best
    if best is None or value(first) < value(best):
        best = first
    if waves:
        push(0, below(first), first.total)
    while queue:
        least, low, high, total = heapq.heappop(queue)
        if least >= value(best) * (1 - _PROVEN):
            break
        middle = (low + high) // 2
        found = solver.solve(float(bounds[middle]))
        push(middle + 1, high, total)
        if found is not None:
            if value(found) < value(best):
                best = found
            push(low, min(middle, below(found)), found.total)
    return best


class _Tables:
    """What both solvers go by: sums with the tie-breakers, and masks of a bound."""

    def __init__(self, cost: CostModel, wanted: Wanted) -> None:
        self.count = len(cost.offers)
        self.wanted = wanted
        offered = np.array([max(1, offer.memory_bytes) for offer in cost.offers], np.float64)
        needs = np.where(np.isfinite(cost.needs), cost.needs, 0.0)
        # To the percent: what devices offer differs by chance from one plan to the next.
        loads = np.round(needs[None] / offered[:, None, None], 2)
        self.sums = cost.stage_sums + _STAGE_TIE_S + _LOAD_TIE_S * loads**2
        self.streams = cost.stage_streams
        self.links, self.link_streams = cost.link_sums, cost.link_streams
        self.enter, self.leave = cost.ends_sums

    def under(self, bound: float) -> tuple[Table, Table]:
        """Sums of stages and links, infinite where one of them is slower than ``bound``."""
        stages = np.where(self.streams <= bound, self.sums, np.inf)
        return stages, np.where(self.link_streams <= bound, self.links, np.inf)

    def begin(self, device: int) -> Table:
        """[cut]: the sums before a first stage on ``device``."""
        start = np.full(self.sums.shape[1], np.inf)
        start[0] = self.enter[device]
        return start

    def found(self, total: float, shares: Sequence[Share]) -> _Found:
        slowest = max(float(self.streams[s.device, s.first, s.end]) for s in shares)
        for one, other in pairwise(shares):
            slowest = max(slowest, float(self.link_streams[one.device, other.device]))
        return _Found(total, slowest, tuple(shares))


class _AnyOrder:
    """Every set of devices in every order: 2^n * n steps of one device each."""

    def __init__(self, cost: CostModel, wanted: Wanted) -> None:
        self._tables = _Tables(cost, wanted)
        count = len(cost.offers)
        must = sum(1 << device for device in wanted.required)
        self._goals = [
            chosen
            for chosen in range(1, 1 << count)
            if chosen.bit_count() >= wanted.min_stages and chosen & must == must
        ]

    def solve(self, bound: float) -> _Found | None:
        tables = self._tables
        stages, links = tables.under(bound)
        count, cuts = tables.count, stages.shape[1]
        # reached[set, last, cut]: the smallest sum of these devices up to this cut.
        reached = np.full((1 << count, count, cuts), np.inf)
        for chosen in range(1, 1 << count):
            for last in range(count):
                if chosen >> last & 1:
                    before = self._before(reached, links, chosen ^ 1 << last, last)
                    reached[chosen, last] = (before[:, None] + stages[last]).min(axis=0)
        if not self._goals:
            return None
        ends = reached[self._goals, :, -1] + tables.leave[None, :]
        goal, last = divmod(int(np.argmin(ends[:, ::-1])), count)
        chosen, last = self._goals[goal], count - 1 - last  # of equals, the given order
        total = float(reached[chosen, last, -1] + tables.leave[last])
        if not np.isfinite(total):
            return None
        shares: list[Share] = []
        end = cuts - 1
        while chosen:
            rest = chosen ^ 1 << last
            before = self._before(reached, links, rest, last)
            first = int(np.argmin(before + stages[last, :, end]))
            shares.append(Share(last, first, end))
            if rest:
                ways = reached[rest, :, first] + links[:, last]
                last = count - 1 - int(np.argmin(ways[::-1]))
            chosen, end = rest, first
        return tables.found(total, shares[::-1])

    def _before(self, reached: Table, links: Table, rest: int, device: int) -> Table:
        """[cut]: the smallest sum of the devices ``rest`` up to a cut, and on to ``device``."""
        if not rest:
            return self._tables.begin(device)
        ways: Table = (reached[rest] + links[:, device, None]).min(axis=0)
        return ways


class _InOrder:
    """One order of the devices, any of them left out but the required ones."""

    def __init__(self, cost: CostModel, wanted: Wanted, order: Sequence[int]) -> None:
        self._tables = _Tables(cost, wanted)
        self._order = list(order)
        # The last required device before each place: nothing earlier may come right before it.
        self._since: list[int] = []
        since = 0
        self._must_begin = len(order)
        for place, device in enumerate(order):
            self._since.append(since)
            if device in wanted.required:
                since = place
                self._must_begin = min(self._must_begin, place)
        self._must_end = since if wanted.required else 0

    def solve(self, bound: float) -> _Found | None:
        tables, order = self._tables, self._order
        stages, links = tables.under(bound)
        count, cuts = tables.count, stages.shape[1]
        most = max(1, self._tables.wanted.min_stages)
        # reached[k, place, cut]: the smallest sum with the last stage at this place of the order
        # and k stages so far; k stops counting at as many as are asked for.
        reached = np.full((most + 1, count, cuts), np.inf)
        for place, device in enumerate(order):
            for stage in range(1, most + 1):
                before = self._before(reached, links, stage, place)
                if np.isfinite(before).any():
                    reached[stage, place] = (before[:, None] + stages[device]).min(axis=0)
        ends = reached[most, self._must_end :, -1] + tables.leave[order[self._must_end :]]
        place = int(np.argmin(ends)) + self._must_end
        total = float(ends[place - self._must_end])
        if not np.isfinite(total):
            return None
        shares: list[Share] = []
        stage, end = most, cuts - 1
        while True:
            device = order[place]
            before = self._before(reached, links, stage, place)
            first = int(np.argmin(before + stages[device, :, end]))
            shares.append(Share(device, first, end))
            if first == 0:
                return tables.found(total, shares[::-1])
            ways = self._ways(reached, links, stage, place)[:, :, first]
            which, back = divmod(int(np.argmin(ways)), ways.shape[1])
            stage, place = self._counts(stage)[which], self._since[place] + back
            end = first

    def _counts(self, stage: int) -> list[int]:
        """How many stages there may have been before the ``stage``-th."""
        most = max(1, self._tables.wanted.min_stages)
        return [stage - 1, most] if stage == most else [stage - 1]

    def _ways(self, reached: Table, links: Table, stage: int, place: int) -> NDArray[np.float64]:
        """[count before, place before, cut]: the sums up to a cut and on to this place."""
        device, since = self._order[place], self._since[place]
        hops = links[self._order[since:place], device]
        ways: Table = reached[self._counts(stage), since:place] + hops[None, :, None]
        return ways

    def _before(self, reached: Table, links: Table, stage: int, place: int) -> Table:
        """[cut]: the smallest sum before the ``stage``-th stage at ``place``."""
        before = np.full(reached.shape[2], np.inf)
        if stage == 1 and place <= self._must_begin:
            before = self._tables.begin(self._order[place])
        if place > self._since[place]:
            ways = self._ways(reached, links, stage, place)
            before = np.minimum(before, ways.min(axis=(0, 1)))
        return before
