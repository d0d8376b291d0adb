"""Our planner against the rules of others, over homes at random, by one simulator."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgellm.bench.homes import HUGE, MODELS, Home, random_home, random_office
from edgellm.bench.policies import POLICIES, Stages
from edgellm.bench.simulator import play, shortage
from edgellm.errors import NoPlanError
from edgellm.planner import Aim, Objective, plan_for
from edgellm.types import Epoch

NO_WORSE_S = 1e-6
"""A plan that takes less than this longer a token is as fast: the planner's ties are below it."""


@dataclass(frozen=True, slots=True)
class Rival:
    """How one rule did."""

    name: str
    fits: int
    """Homes in which its split fits."""
    short: int
    """Homes in which it does not: out of memory, or no split at all."""
    median: float
    """Of its time a token by ours, over the homes in which it fits; 0 for none."""
    worst: float
    better: int
    """Homes in which it is faster than ours."""


@dataclass(frozen=True, slots=True)
class Contest:
    """All rules over the same homes."""

    homes: int
    planned: int
    """Homes in which ours found a plan."""
    alone: int
    """Homes in which that is one device alone."""
    missed: int
    """Homes in which ours found none, but a rule's split fits."""
    rivals: tuple[Rival, ...]


def contest(homes: int, seed: int = 0, told: Callable[[int], None] | None = None) -> Contest:
    """Score all rules. ``told`` hears how many homes are done."""
    chance = random.Random(seed)
    ratios: dict[str, list[float]] = {name: [] for name in POLICIES}
    better = dict.fromkeys(POLICIES, 0)
    planned = alone = missed = 0
    for number in range(homes):
        home = random_home(chance)
        ours = _ours(home)
        tpot = None if ours is None else _tpot(home, ours)
        planned += ours is not None
        alone += ours is not None and len(ours) == 1
        found = False
        for name, policy in POLICIES.items():
            theirs = policy(home)
            scored = None if theirs is None else _tpot(home, theirs)
            if scored is None:
                continue
            found = True
            if tpot is not None:
                ratios[name].append(scored / tpot)
                better[name] += scored < tpot - NO_WORSE_S
        missed += found and tpot is None
        if told is not None:
            told(number + 1)
    rivals = tuple(
        Rival(
            name=name,
            fits=len(each),
            short=homes - len(each),
            median=statistics.median(each) if each else 0.0,
            worst=max(each, default=0.0),
            better=better[name],
        )
        for name, each in ratios.items()
    )
    return Contest(homes, planned, alone, missed, rivals)


@dataclass(frozen=True, slots=True)
class Search:
    """How long the planner looked for one plan."""

    devices: int
    layers: int
    objective: str
    seconds: float
    """Of one processor."""
    target_s: float
    gap: float
    """How far the plan's value may be above the best one's, by the proven bound: 0.01 is 1 %."""


def searches() -> Iterator[Search]:
    """Time the planner at the sizes that it promises something for."""
    for devices, model, target_s in ((10, MODELS[-1], 1.0), (64, HUGE, 5.0)):
        home = random_office(random.Random(devices), devices, model)
        for aim in (Aim.LATENCY, Aim.TTFT, Aim.TPOT, Aim.THROUGHPUT):
            begin = time.process_time()
            made = plan_for(
                home.card,
                home.offers,
                home.settings,
                Epoch(1),
                home.situation,
                objective=Objective(aim),
            )
            took = time.process_time() - begin
            gap = made.value / made.least - 1 if made.least else 0.0
            yield Search(devices, model.n_layers, aim.value, took, target_s, max(gap, 0.0))


def _ours(home: Home) -> Stages | None:
    try:
        made = plan_for(
            home.card,
            home.offers,
            home.settings,
            Epoch(1),
            home.situation,
            objective=Objective(Aim.TPOT),
        )
    except NoPlanError:
        return None
    by_name = {offer.name: offer for offer in home.offers}
    return [(by_name[stage.device], stage.span) for stage in made.plan.stages]


def _tpot(home: Home, stages: Stages) -> float | None:
    """None where the split does not fit."""
    if not stages or shortage(home.card, home.settings, stages):
        return None
    return play(home.card, home.settings, stages, home.situation).tpot_s
