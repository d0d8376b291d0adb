"""What all searches go by: the sums and maxima of every stage and link, as arrays. Pure.

Cuts are numbered as in ``SpanTable``, devices as in the offers. Infinite means: may not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from edgellm.planner.cost import CostModel, Share
from edgellm.planner.pace import Table

STAGE_TIE_S = 1e-6
LOAD_TIE_S = 1e-7
"""Times the square of the share of a device's memory."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a plan, beside being good by its objective."""

    min_stages: int = 1
    required: frozenset[int] = frozenset()
    """Devices, by their index, that must have a stage."""
    forbidden: frozenset[int] = frozenset()
    """Devices that must have none."""
    min_layers: int = 1
    """Of each stage."""
    proof: bool = True
    """Whether it matters how far from the best the plan can be, where nothing proves that it is
    the best: a search over many devices takes most of its time for that."""


@dataclass(frozen=True, slots=True)
class Found:
    """A plan under some limits: its sum, and the highest that it brings to each of the maxima."""

    total: float
    tops: tuple[float, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search says of one set of limits."""

    least: float
    """No plan under these limits has a smaller sum. Infinite: there is none that counts."""
    found: Found | None


class Limited:
    """Sums under some limits on the maxima; what is beyond one of them is infinite."""

    def __init__(self, tables: Tables, limits: Sequence[float]) -> None:
        stages, links = tables.sums, tables.links
        for limit, peak in zip(limits, tables.peaks, strict=True):
            if np.isfinite(limit):
                stages = np.where(peak.stages <= limit, stages, np.inf)
                links = np.where(peak.links <= limit, links, np.inf)
        self.stages = stages
        """[device, first, end]."""
        self.links = links
        """[from, to]; infinite from a device to itself."""

    @cached_property
    def by_cut(self) -> Table:
        """[first, end, device]."""
        return np.ascontiguousarray(self.stages.transpose(1, 2, 0))

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """For each cut, the first and last of those at which a stage from it can end, as a range;
        empty where none can begin there."""
        able = np.asarray(np.isfinite(self.stages).any(axis=0))
        found = []
        for first in range(able.shape[0]):
            at = np.flatnonzero(able[first])
            found.append((int(at[0]), int(at[-1]) + 1) if at.size else (first, first))
        return found


class Tables:
    """What a cost model and the wishes for a plan come to, with the tie-breakers."""

    def __init__(self, cost: CostModel, wanted: Wanted) -> None:
        self.count = len(cost.offers)
        self.cuts = cost.spans.pieces + 1
        self.wanted = wanted
        self.peaks = cost.peaks
        offered = np.array([max(1, offer.memory_bytes) for offer in cost.offers], np.float64)
        needs = np.where(np.isfinite(cost.needs), cost.needs, 0.0)
        # To the percent: what devices offer differs by chance from one plan to the next.
        loads = np.round(needs[None] / offered[:, None, None], 2)
        self.sums = cost.stage_sums + STAGE_TIE_S + LOAD_TIE_S * loads**2
        self.sums[sorted(wanted.forbidden)] = np.inf
        if wanted.min_layers > 1:
            layers = np.array(cost.spans.cuts)
            short = layers[None, :] - layers[:, None] < wanted.min_layers
            self.sums[:, short] = np.inf
        self.links = cost.link_sums.copy()
        np.fill_diagonal(self.links, np.inf)
        self.enter, self.leave = cost.ends_sums

    def limited(self, limits: Sequence[float]) -> Limited:
        """The sums of what stays within a limit for each of the maxima."""
        return Limited(self, limits)

    def levels(self) -> list[Table]:
        """For each of the maxima, every value that it can have, ascending."""
        found = []
        able = np.isfinite(self.sums)
        for peak in self.peaks:
            off = ~np.eye(self.count, dtype=bool)
            found.append(np.unique(np.concatenate([peak.stages[able], peak.links[off]])))
        return found

    def found(self, shares: Sequence[Share]) -> Found:
        """The plan of these shares, which must be able to be one."""
        hops = list(pairwise(share.device for share in shares))
        total = self.enter[shares[0].device] + self.leave[shares[-1].device]
        total += sum(self.sums[share.device, share.first, share.end] for share in shares)
        total += sum(self.links[hop] for hop in hops)
        tops = []
        for peak in self.peaks:
            stages = [peak.stages[share.device, share.first, share.end] for share in shares]
            tops.append(float(max([*stages, *(peak.links[hop] for hop in hops)])))
        return Found(float(total), tuple(tops), tuple(shares))

    def value(self, found: Found) -> float:
        """What the objective makes of it, ties included."""
        return found.total + sum(
            peak.weight * top for peak, top in zip(self.peaks, found.tops, strict=True)
        )

    @property
    def slack(self) -> float:
        """More than the tie-breakers can add to any plan."""
        return self.count * (STAGE_TIE_S + LOAD_TIE_S)
