"""Search: which devices, in which order, with which spans. Exact for what it promises. Pure.

``partition`` is the seam behind which a better policy (speeds, links) can take its place: it
gets a ``SpanTable`` and offers and answers with shares that fit, or None.

What counts here is memory: fewest devices first, then the lowest peak share of any device's
memory, then shares as even as they can be. All orders are tried for up to ``FREE_ORDER``
devices; with more, the given order is kept (devices may still be left out).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgellm.planner.inputs import DeviceOffer, SpanTable

FREE_ORDER = 6


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part: from cut number ``first`` to cut number ``end`` of a SpanTable."""

    device: int
    """Index into the offers."""
    first: int
    end: int


Partition = Callable[[SpanTable, Sequence[DeviceOffer], int], tuple[Share, ...] | None]
"""(spans, offers, fewest stages) -> the shares in the order of layers, or None where none fit."""

_Masks = list[list[int]]
"""``masks[device][first]``: bit ``end`` is set where the span [first, end) fits the device."""
_Route = Callable[[_Masks, int, int], list[int] | None]
"""(masks, number of stages, pieces) -> the devices of one assignment that fits, or None."""


def partition_by_memory(
    spans: SpanTable, offers: Sequence[DeviceOffer], min_stages: int
) -> tuple[Share, ...] | None:
    """The policy above. ``min_stages`` 1 makes one device alone the first candidate.

    Finds an assignment whenever one exists (in the given order, for more than ``FREE_ORDER``
    devices).
    """
    loads = _loads(spans, offers)
    routes: list[_Route] = [_route_in_order]
    if len(offers) <= FREE_ORDER:
        routes.append(_route_in_any_order)
    peaks = sorted({load for table in loads for row in table for load in row if load <= 1.0})
    roomy = _masks(loads, 1.0)
    for stages in range(max(1, min_stages), min(len(offers), spans.most_stages()) + 1):
        for route in routes:
            if route(roomy, stages, spans.pieces) is not None:
                return _lowest_peak(loads, peaks, stages, spans.pieces, route)
    return None


_Loads = list[list[list[float]]]
"""``loads[device][first][end]``: the share of the device's memory that the span takes."""


def _loads(spans: SpanTable, offers: Sequence[DeviceOffer]) -> _Loads:
    points = range(spans.pieces + 1)
    needs = [
        [
            spans.memory(first, end) if first < end and spans.problem(first, end) is None else None
            for end in points
        ]
        for first in points
    ]
    return [[[_load(need, o.memory_bytes) for need in row] for row in needs] for o in offers]


def _load(need: int | None, offer: int) -> float:
    if need is None or need > offer:  # decided in integers: a rounded quotient must not let it pass
        return math.inf
    return need / offer if offer else 0.0


def _masks(loads: _Loads, peak: float) -> _Masks:
    return [
        [sum(1 << end for end, load in enumerate(row) if load <= peak) for row in table]
        for table in loads
    ]


def _lowest_peak(
    loads: _Loads, peaks: Sequence[float], stages: int, pieces: int, route: _Route
) -> tuple[Share, ...] | None:
    """The shares with the lowest peak that ``route`` finds. ``peaks`` are all loads, ascending."""
    # More memory never makes an assignment impossible, so feasibility is monotonic in the peak.
    at = bisect_left(
        peaks, True, key=lambda peak: route(_masks(loads, peak), stages, pieces) is not None
    )
    devices = route(_masks(loads, peaks[at]), stages, pieces)
    return None if devices is None else _even_shares(loads, devices, pieces, peaks[at])


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _extend(reached: int, row: Sequence[int]) -> int:
    """The cut points reached when one device goes on from any of the ``reached`` ones."""
    beyond = 0
    for first in _bits(reached):
        beyond |= row[first]
    return beyond


def _comes_from(reached: int, row: Sequence[int], end: int) -> int | None:
    """A reached cut point from which the device gets to ``end``."""
    return next((first for first in _bits(reached) if row[first] >> end & 1), None)


def _route_in_order(masks: _Masks, stages: int, pieces: int) -> list[int] | None:
    """Devices keep the order of the offers; any may be left out."""
    # reached[d][k]: cut points where k of the first d devices can end.
    reached = [[1] + [0] * stages]
    for row in masks:
        last = reached[-1]
        reached.append([1] + [last[k] | _extend(last[k - 1], row) for k in range(1, stages + 1)])
    if not reached[-1][stages] >> pieces & 1:
        return None
    devices: list[int] = []
    end, left = pieces, stages
    for device in range(len(masks) - 1, -1, -1):
        if left and not reached[device][left] >> end & 1:
            first = _comes_from(reached[device][left - 1], masks[device], end)
            if first is None:
                return None
            devices.append(device)
            end, left = first, left - 1
    return devices[::-1]


def _route_in_any_order(masks: _Masks, stages: int, pieces: int) -> list[int] | None:
    """Every choice and order of ``stages`` devices, by dynamic programming over sets of them."""
    reached: dict[int, int] = {0: 1}
    goal = None
    for chosen in range(1, 1 << len(masks)):
        if chosen.bit_count() > stages:
            continue
        reached[chosen] = 0
        for device in _bits(chosen):
            reached[chosen] |= _extend(reached[chosen ^ 1 << device], masks[device])
        if goal is None and chosen.bit_count() == stages and reached[chosen] >> pieces & 1:
            goal = chosen
    if goal is None:
        return None
    devices: list[int] = []
    end = pieces
    while goal:
        for device in _bits(goal):
            first = _comes_from(reached[goal ^ 1 << device], masks[device], end)
            if first is not None:
                devices.append(device)
                goal, end = goal ^ 1 << device, first
                break
        else:
            return None
    return devices[::-1]


def _even_shares(
    loads: _Loads, devices: Sequence[int], pieces: int, peak: float
) -> tuple[Share, ...] | None:
    """Cut for these devices in this order, no load above ``peak``, loads as even as possible."""
    # best[p] after n devices: (sum of squared loads, cut points so far) when they end at p.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for device in devices:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (cost, cuts) in best.items():
            for end in range(first + 1, pieces + 1):
                load = loads[device][first][end]
                if load > peak:
                    continue
                total = cost + load * load
                if end not in reached or total < reached[end][0]:
                    reached[end] = (total, (*cuts, end))
        best = reached
    if pieces not in best:
        return None
    cuts = best[pieces][1]
    return tuple(Share(device, cuts[at], cuts[at + 1]) for at, device in enumerate(devices))
