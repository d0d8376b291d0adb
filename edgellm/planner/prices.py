"""How good a plan can be at most: a bound from prices on devices. Pure.

What makes the search hard is that each device has one stage. So that is dropped: a way through
the layers may come back to a device, but not at once, nor with only one other between. In its
place each stage on a device costs a price, which is given back once for every device. Whatever
the prices, a plan with each device once pays no more than it gets back, so that the cheapest way
is a bound on all plans. Subgradient steps raise the prices of devices that the way uses too often
and lower those that it does not use: the bound rises (Lagrangian relaxation).

A device that must have a stage may have a negative price; that there be at least so many stages
has a price as well, which each stage gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.planner.pace import Table
from edgellm.planner.tables import Limited, Tables

_Ints = NDArray[np.intp]
_INERTIA = 0.6
"""How much of the last step's direction the next one keeps."""
_PATIENCE = 8
"""Steps without a better bound before they become shorter."""
_SHORTEST = 0.02
_REMEMBERED = 2
"""Prices of limits before the last ones, to begin with."""


@dataclass(frozen=True, slots=True)
class Priced:
    """The bound of some prices, and what the rest of a way costs at least."""

    bound: float
    rest: Table
    """[cut, device]: from where a stage on this device ended, with the prices of what follows."""
    entry: Table
    """[device]: a whole way whose first stage is there, without what is given back."""
    prices: Table
    """[device]."""
    stage_price: float
    """What each stage gets, for ``min_stages``."""
    min_stages: int
    uses: Table
    """[device]: how often the cheapest way has a stage there."""

    def togo(self, sets: _Ints, lasts: _Ints) -> Table:
        """[row, cut]: what plans that used these devices, this one last, still cost at least."""
        used = ((sets[:, None] >> np.arange(len(self.prices))) & 1).astype(bool)
        return self.rest[:, lasts].T - self.back(used)[:, None]

    def back(self, used: NDArray[np.bool_]) -> Table:
        """[row]: the most that is given back for what comes after these devices had a stage."""
        back: Table = ~used @ self.prices
        if self.stage_price:
            missing = np.maximum(0, self.min_stages - used.sum(axis=1))
            back = back - self.stage_price * missing
        return back


def priced(
    tables: Tables, limited: Limited, prices: Table, stage_price: float = 0.0
) -> Priced | None:
    """The bound of these prices; None where no way leads through at all."""
    count, cuts = tables.count, tables.cuts
    each = prices - stage_price
    rest = np.full((cuts, count), np.inf)
    rest[-1] = tables.leave
    other = np.full((cuts, count), np.inf)
    """As ``rest``, with another next device."""
    nexts = np.full((cuts, count), -1)
    others_next = np.full((cuts, count), -1)
    stage_end = np.full((2, cuts, count), -1)
    """Where the best stage from a cut ends, and the best with another device after it."""
    stage_next = np.full((2, cuts, count), -1)
    devices = np.arange(count)
    entry = np.full(count, np.inf)
    for first in range(cuts - 2, -1, -1):
        low, high = limited.ends[first]
        if high <= low:
            continue
        stages = limited.by_cut[first, low:high]
        ways = stages + rest[low:high]
        at = ways.argmin(axis=0)
        best = ways[at, devices] + each
        after = nexts[low:high][at, devices]
        # With another device after it: the second best way from where the next would be the same.
        again = np.where(nexts[low:high] == after, stages + other[low:high], ways)
        at_again = again.argmin(axis=0)
        second = again[at_again, devices] + each
        stage_end[0, first], stage_end[1, first] = at + low, at_again + low
        stage_next[0, first] = after
        stage_next[1, first] = np.where(
            nexts[low:high][at_again, devices] == after,
            others_next[low:high][at_again, devices],
            nexts[low:high][at_again, devices],
        )
        if first == 0:
            entry = tables.enter + best
            break
        onward = limited.links + best
        back = np.flatnonzero(after >= 0)  # from after[d] to d, the way on may not lead back
        onward[after[back], back] = limited.links[after[back], back] + second[back]
        nexts[first] = onward.argmin(axis=1)
        rest[first] = onward[devices, nexts[first]]
        onward[devices, nexts[first]] = np.inf
        others_next[first] = onward.argmin(axis=1)
        other[first] = onward[devices, others_next[first]]
    begin = int(entry.argmin())
    if not np.isfinite(entry[begin]):
        return None
    given_back = float(prices.sum()) - stage_price * tables.wanted.min_stages
    uses = _uses(count, cuts, begin, nexts, others_next, stage_end, stage_next)
    return Priced(
        float(entry[begin]) - given_back,
        rest,
        entry,
        prices,
        stage_price,
        tables.wanted.min_stages,
        uses,
    )


def _uses(
    count: int,
    cuts: int,
    begin: int,
    nexts: _Ints,
    others_next: _Ints,
    stage_end: _Ints,
    stage_next: _Ints,
) -> Table:
    """[device]: how often the cheapest way has a stage there."""
    uses = np.zeros(count)
    device, cut, which = begin, 0, 0
    while True:
        uses[device] += 1
        end, after = int(stage_end[which, cut, device]), int(stage_next[which, cut, device])
        if end == cuts - 1:
            return uses
        # The stage of ``after`` at ``end`` may not lead back to this device.
        which = 1 if int(stage_next[0, end, after]) == device else 0
        device, cut = after, end


class Pricing:
    """Looks for the prices with the highest bound, and goes on from the last ones it had."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._prices = np.zeros(tables.count)
        self._stage_price = 0.0
        self._earlier: list[tuple[Table, float]] = []
        wanted = tables.wanted
        self._least = np.zeros(tables.count)
        self._least[sorted(wanted.required)] = -np.inf
        self.steps = 0
        """Taken so far."""

    def raise_bound(
        self, limited: Limited, steps: int, level: float, enough: float, *, start: bool = False
    ) -> Priced | None:
        """The best bound of ``steps`` steps towards ``level``, fewer once it is above ``enough``;
        ``start``: also from prices by what each device can hold, if these are better.

        None where no way leads through at all: nothing is possible under these limits.
        """
        tables, wanted = self._tables, self._tables.wanted
        best: Priced | None = None
        prices, stage_price = self._prices, self._stage_price
        starts = [(prices, stage_price), *self._earlier]
        if start:
            starts.append((first_prices(tables, limited, level), 0.0))
        for each in starts:
            now = priced(tables, limited, *each)
            self.steps += 1
            if now is None:
                return None
            if best is None or now.bound > best.bound:
                best = now
        now, pace, waited = best, 1.0, 0
        heading, stages_heading = np.zeros(tables.count), 0.0
        for _ in range(steps):
            if now is None or best is None or best.bound >= enough or pace < _SHORTEST:
                break
            slope = now.uses - 1.0
            slope[(now.prices <= self._least) & (slope < 0)] = 0.0
            missing = wanted.min_stages - float(now.uses.sum())
            if wanted.min_stages <= 1 or (now.stage_price <= 0 and missing < 0):
                missing = 0.0
            if not slope.any() and missing == 0.0:
                break  # the cheapest way is a plan: nothing can be better
            heading = slope + _INERTIA * heading
            stages_heading = missing + _INERTIA * stages_heading
            gap = max(level - now.bound, 1e-6 * abs(level))
            far = pace * gap / (float(heading @ heading) + stages_heading**2)
            now = priced(
                tables,
                limited,
                np.maximum(self._least, now.prices + far * heading),
                max(0.0, now.stage_price + far * stages_heading),
            )
            self.steps += 1
            if now is None:
                break
            waited = 0 if now.bound > best.bound + 1e-4 * abs(level - best.bound) else waited + 1
            if now.bound > best.bound:
                best = now
            if waited >= _PATIENCE:
                now, pace, waited = best, pace / 2, 0
                heading, stages_heading = np.zeros(tables.count), 0.0
        if best is not None:
            self._earlier = [(prices, stage_price), *self._earlier][:_REMEMBERED] if start else []
            self._prices, self._stage_price = best.prices, best.stage_price
        return best


def first_prices(tables: Tables, limited: Limited, level: float) -> Table:
    """[device]: prices from what each device can hold and what that takes, as if layers could be
    dealt out one by one, links cost the least they can, and all layers were alike.

    With a worth w of each layer, a device is worth what w times its layers is above their time.
    The bound w * layers - sum of what devices are worth is highest for some w: found by halving.
    """
    count, cuts = tables.count, tables.cuts
    into = np.minimum(tables.enter, limited.links.min(axis=0, initial=np.inf))
    lengths = np.arange(1, cuts)
    least = np.full((count, cuts - 1), np.inf)
    """[device, length]."""
    for length in lengths:
        least[:, length - 1] = np.diagonal(limited.stages, length, 1, 2).min(axis=1)
    times = least + np.where(np.isfinite(into), into, 0.0)[:, None]

    def worths(layer: float) -> tuple[Table, float]:
        gains = layer * lengths[None, :] - times
        best = gains.argmax(axis=1)
        gain = np.maximum(0.0, gains[np.arange(count), best])
        return gain, float(lengths[best][gain > 0].sum())

    low, high = 0.0, 2 * abs(level) + 1e-12
    for _ in range(40):
        middle = (low + high) / 2
        if worths(middle)[1] < cuts - 1:
            low = middle
        else:
            high = middle
    return worths(low)[0]


def priced_by_room(tables: Tables, limited: Limited) -> Priced | None:
    """Prices by how many layers each device can hold, so that room left empty is what costs:
    where hardly anything fits, this is what leads to a plan."""
    able = np.isfinite(limited.stages)
    spans = np.arange(tables.cuts)[None, :] - np.arange(tables.cuts)[:, None]
    room = np.where(able, spans[None], 0).max(axis=(1, 2))
    usual = np.median(limited.stages[able]) if able.any() else 0.0
    return priced(tables, limited, 10 * float(usual) * room)
