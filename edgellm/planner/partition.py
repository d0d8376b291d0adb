"""Search: which devices, in which order, with which spans. Pure.

``Partition`` is the seam behind which another policy can take its place: it gets a ``CostModel``
and what is asked for, and answers with shares that fit, or None.

What is minimised is a sum over stages and links, S, plus weights times one maximum over them or
two. Under given limits on the maxima a solver finds the smallest S, or says what it is at least:
``exact`` for up to ``EXACT_DEVICES`` devices, ``prices`` and ``beam`` beyond. Over the limits goes
a branch and bound: S grows as a limit falls, so that the least S at the upper corner of a range of
limits plus the weights times its lower corner is the least that anything in it can cost.

Plans that differ by less than the tie-breakers are the same: then fewer stages win, then even
shares of memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as numbers
from typing import Protocol

import numpy as np

from edgellm.planner.beam import beam
from edgellm.planner.cost import CostModel, Share
from edgellm.planner.exact import EveryOrder
from edgellm.planner.ordered import best_in_order, order_around, polished, reordered
from edgellm.planner.prices import Priced, Pricing, priced_by_room
from edgellm.planner.tables import Answer, Found, Limited, Tables, Wanted

EXACT_DEVICES = 10
"""Up to so many, the answer is the best of all choices in all orders."""
_EXACT_ANYWAY = 6
"""Up to so many, also where no proof is asked for."""
_UNPRICED = 5
"""Up to so many, all orders are tried sooner than prices are found."""
_FIRST_STEPS, _STEPS = 24, 4
"""Of the prices, for the first limits and for each of the others, where an exact search follows."""
_PROVEN = 1e-9
"""An exact answer is the best up to this part of it: rounding, no more."""
_PRICE_STEPS = 20
"""Of the prices for the first try at some limits, doubled for each of the next."""
_WIDTHS = ((32, 64, 128, 256, 512), (48, 96, 192, 384, 640))
"""Partial plans of the beam at each cut, for each try at the same limits; and those of a second
search where the first came to no good proof: what a beam drops at one width it keeps at another,
and not only at a larger one."""
_GOOD_PROOF = 0.01
_BEAM_WORK = 0.5
"""A beam takes as long as so many steps of the prices, for each of the partial plans at a cut."""
_ORDERS, _ORDER_WORK = 400, 0.15
"""Orders near that of a good plan that are tried, and what each of them takes in such steps."""
_MOST_WORK, _LEAST_WORK = 900, 60
"""Steps, with and without a proof."""
_CLOSE = 0.004
"""With many devices the search goes on until no plan can be better by more than this part."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What a search came to."""

    shares: tuple[Share, ...]
    least: float | None
    """No plan's value by the objective is below it: equal to the plan's own, but for rounding,
    where the search was exact. None: the policy promises nothing."""


Partition = Callable[[CostModel, Wanted], Solution | None]


class _Solver(Protocol):
    close: float
    """The part of a value by which it is no use to get better."""
    tries: int
    """How often it is of use to ask for the same limits, each time with more effort."""

    def solve(self, limited: Limited, level: float, cutoff: float, tried: int = 0) -> Answer:
        """The smallest sum under some limits. ``level`` is that of a plan that would be as good
        as the best so far; above ``cutoff`` nothing is of use."""
        ...

    @property
    def tired(self) -> bool:
        """Whether it has worked enough."""
        ...


def partition_by_speed(cost: CostModel, wanted: Wanted) -> Solution | None:
    """The best plan by the cost model's objective; None where nothing fits."""
    count = len(cost.offers)
    if len(wanted.required) > count or wanted.min_stages > count:
        return None
    tables = Tables(cost, wanted)
    if count > (EXACT_DEVICES if wanted.proof else _EXACT_ANYWAY):
        return _of_many(tables, cost)
    return _descended(tables, _Exact(tables))


def partition_of_many(cost: CostModel, wanted: Wanted) -> Solution | None:
    """The same as it is done for many devices, however few there are: for tests of the bound."""
    return _of_many(Tables(cost, wanted), cost)


def _of_many(tables: Tables, cost: CostModel) -> Solution | None:
    best: Found | None = None
    least = 0.0
    for widths in _WIDTHS:
        found, bound = _Descent(tables, _Many(tables, cost, widths)).run()
        least = max(least, bound)
        if best is None or (found is not None and tables.value(found) < tables.value(best)):
            best = found
        if best is None or not tables.wanted.proof:
            break
        if tables.value(best) <= least * (1 + _GOOD_PROOF):
            break
    return _solution(tables, best, least)


def _descended(tables: Tables, solver: _Solver) -> Solution | None:
    return _solution(tables, *_Descent(tables, solver).run())


def _solution(tables: Tables, found: Found | None, least: float) -> Solution | None:
    if found is None:
        return None
    return Solution(found.shares, max(0.0, min(least, tables.value(found)) - tables.slack))


@dataclass(frozen=True, slots=True)
class _Range:
    """Limits between two corners, each a number into the levels of every maximum."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    least: float
    """No plan in it has a smaller sum."""
    found: Found | None
    """A plan within its upper corner."""
    tried: int = 0
    """How often its very upper corner was solved."""


@dataclass(frozen=True, slots=True)
class _Split:
    """How to halve a range of limits."""

    peak: int
    middle: int
    """The last level of its lower half."""
    spread: float
    """What its levels differ by, weighted."""


class _Descent:
    """Branch and bound over the limits on the maxima."""

    def __init__(self, tables: Tables, solver: _Solver) -> None:
        self._tables = tables
        self._solver = solver
        self._levels = tables.levels()
        self._best: Found | None = None
        self._queue: list[tuple[float, int, _Range]] = []
        self._order = numbers()

    def run(self) -> tuple[Found | None, float]:
        """The best plan, and what no plan can be better than."""
        solver = self._solver
        top = tuple(len(levels) - 1 for levels in self._levels)
        unlimited = self._tables.limited([np.inf] * len(top))
        first = solver.solve(unlimited, np.inf, np.inf)
        self._keep(first.found)
        if self._best is None and np.isinf(first.least) and first.least > 0:
            return None, np.inf
        self._push(tuple(0 for _ in top), top, first, 1)
        while self._queue:
            value, _, one = self._queue[0]
            goal = self._value() * (1 - solver.close)
            if self._best is None or value >= goal or solver.tired:
                return self._best, value
            heapq.heappop(self._queue)
            split = self._split(one)
            narrow = split is None or split.spread < goal * solver.close / 2
            if narrow and one.tried < solver.tries:
                # To halve the range would hardly help: what its plans cost at least must rise.
                answer = self._solve(one, one.high, one.tried)
                self._push(one.low, one.high, answer, one.tried + 1)
            elif split is None:
                return self._best, value
            else:
                self._halve(one, split)
        return self._best, np.inf if self._best is None else self._value()

    def _halve(self, one: _Range, split: _Split) -> None:
        at, middle = split.peak, split.middle
        upper = (*one.low[:at], middle + 1, *one.low[at + 1 :])
        lower = (*one.high[:at], middle, *one.high[at + 1 :])
        whole = Answer(one.least, one.found)
        self._push(upper, one.high, whole, one.tried)
        if one.found is not None and all(
            top <= levels[number]
            for top, levels, number in zip(one.found.tops, self._levels, lower, strict=True)
        ):
            self._push(one.low, lower, whole, one.tried)
        else:
            self._push(one.low, lower, self._solve(one, lower, 0), 1)

    def _solve(self, one: _Range, high: tuple[int, ...], tried: int) -> Answer:
        """The answer for an upper corner of a range."""
        floor, value = self._floor(one.low), self._value()
        limits = [levels[at] for levels, at in zip(self._levels, high, strict=True)]
        answer = self._solver.solve(
            self._tables.limited(limits),
            value - floor,
            value * (1 - self._solver.close) - floor,
            tried,
        )
        self._keep(answer.found)
        return Answer(max(one.least, answer.least), answer.found or one.found)

    def _value(self) -> float:
        return np.inf if self._best is None else self._tables.value(self._best)

    def _keep(self, found: Found | None) -> None:
        if found is not None and self._tables.value(found) < self._value():
            self._best = found

    def _floor(self, low: tuple[int, ...]) -> float:
        """What the maxima cost at least in a range."""
        cost = least = 0.0
        for peak, levels, at in zip(self._tables.peaks, self._levels, low, strict=True):
            least = max(float(levels[at]), peak.of_former * least)
            cost += peak.weight * least
        return cost

    def _push(self, low: tuple[int, ...], high: tuple[int, ...], whole: Answer, tried: int) -> None:
        """A range to look at, unless nothing in it can be better."""
        if all(a <= b for a, b in zip(low, high, strict=True)):
            value = whole.least + self._floor(low)
            if value < self._value() * (1 - _PROVEN):
                made = _Range(low, high, whole.least, whole.found, tried)
                heapq.heappush(self._queue, (value, next(self._order), made))

    def _split(self, one: _Range) -> _Split | None:
        """Which maximum to halve, and after which of its levels; None for a single point."""
        spread = [
            peak.weight * float(levels[b] - levels[a]) if b > a else -1.0
            for peak, levels, a, b in zip(
                self._tables.peaks, self._levels, one.low, one.high, strict=True
            )
        ]
        if not spread or max(spread) < 0:
            return None
        at = int(np.argmax(spread))
        levels, low, high = self._levels[at], one.low[at], one.high[at]
        # Levels at which even the least sum would be too much are cut off at once.
        room = (self._value() - one.least - self._floor(one.low)) / self._tables.peaks[at].weight
        near = min(high, int(np.searchsorted(levels, levels[low] + room, side="right")))
        middle = int(np.searchsorted(levels, (levels[low] + levels[near]) / 2, side="right")) - 1
        return _Split(at, min(max(low, middle), high - 1), spread[at])


class _Exact:
    """All orders of all devices, with prices to drop what cannot become the best."""

    close = _PROVEN
    tries = 1
    tired = False

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._every = EveryOrder(tables)
        self._pricing = Pricing(tables) if tables.count > _UNPRICED else None

    def solve(self, limited: Limited, level: float, cutoff: float, tried: int = 0) -> Answer:
        priced: Priced | None = None
        if self._pricing is not None:
            start = bool(np.isinf(level))
            if start:
                found = best_in_order(self._tables, limited, _by_speed(self._tables))
                level = cutoff = np.inf if found is None else found.total * (1 + _PROVEN)
            if np.isfinite(level):
                steps = _FIRST_STEPS if start else _STEPS
                priced = self._pricing.raise_bound(limited, steps, level, cutoff, start=start)
                if priced is None:
                    return Answer(np.inf, None)
                if priced.bound >= cutoff:
                    return Answer(priced.bound, None)
        answer = self._every.solve(limited, cutoff, priced)
        # Nothing below the cutoff: that is all that is known then.
        return answer if answer.found is not None else Answer(cutoff, None)


def _by_speed(tables: Tables) -> list[int]:
    """The devices, those first that are quick with the model's smallest pieces."""
    pieces = np.stack([tables.sums[:, at, at + 1] for at in range(tables.cuts - 1)])
    quick = np.where(np.isfinite(pieces), pieces, 1e30).mean(axis=0)
    return [int(device) for device in np.argsort(quick, kind="stable")]


class _Many:
    """Prices for the bound, a beam for the plan."""

    close = _CLOSE

    def __init__(self, tables: Tables, cost: CostModel, widths: tuple[int, ...]) -> None:
        self._tables = tables
        self._pricing = Pricing(tables)
        self._widths = widths
        given = list(range(tables.count))
        by_rate = sorted(given, key=lambda at: -cost.speeds[at].decode_bytes_per_s)
        self._orders = [given, by_rate, _by_speed(tables)]
        self.tries = len(widths) if tables.wanted.proof else 1
        self._around: list[int] = []
        self._work = 0.0
        self._most = _MOST_WORK if tables.wanted.proof else _LEAST_WORK

    @property
    def tired(self) -> bool:
        return self._work >= self._most

    def solve(self, limited: Limited, level: float, cutoff: float, tried: int = 0) -> Answer:
        best: Found | None = None
        under = level
        if np.isinf(level):
            best = self._in_orders(limited)
            level = self._guess(limited) if best is None else best.total
            under = np.inf if best is None else level
            cutoff = level
        before = self._pricing.steps
        priced = self._pricing.raise_bound(
            limited, _PRICE_STEPS << tried, level, cutoff, start=True
        )
        self._work += self._pricing.steps - before
        if priced is None:
            return Answer(np.inf, None)
        if priced.bound >= cutoff and np.isfinite(under):
            return Answer(priced.bound, best)
        if best is None:
            best = self._in_orders(limited)
            under = under if best is None else min(under, best.total)
        if tried:  # what is better by less than matters is in the way of a proof
            under = min(under, cutoff)
        width = self._widths[tried]
        answer = beam(self._tables, limited, priced, under, width)
        self._work += _BEAM_WORK * width
        if answer.found is None and best is None:
            full = priced_by_room(self._tables, limited)
            packed = beam(self._tables, limited, full, under, width) if full else answer
            self._work += _BEAM_WORK * width
            answer = Answer(answer.least, packed.found)
        if answer.found is not None:
            best = answer.found
        if tried and best is None:
            best = best_in_order(self._tables, limited, self._around)
        if best is not None:
            best = polished(self._tables, limited, best)
            if tried:
                best = reordered(self._tables, limited, best, _ORDERS)
                self._work += _ORDERS * _ORDER_WORK
            self._around = order_around(self._tables, limited, best)
        return Answer(max(priced.bound, answer.least), best)

    def _in_orders(self, limited: Limited) -> Found | None:
        """The best plan in any of the orders that have proved good."""
        best: Found | None = None
        for order in [*self._orders, *([self._around] if self._around else [])]:
            found = best_in_order(self._tables, limited, order)
            if found is not None and (best is None or found.total < best.total):
                best = found
        return best

    def _guess(self, limited: Limited) -> float:
        """A sum that plans may have, where none is known: to step towards."""
        free = self._pricing.raise_bound(limited, 1, 1.0, np.inf)
        return 1.0 if free is None else 3 * abs(free.bound)
