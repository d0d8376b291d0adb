"""The planner is optimal: equal to trying all plans, or as near the proven bound as promised."""

from __future__ import annotations

import random

import pytest

from edgellm.bench.homes import HUGE, MODELS, Home, random_office
from edgellm.bench.simulator import play
from edgellm.errors import NoPlanError
from edgellm.planner import Explained, parse_objective, partition, plan_for
from edgellm.planner.cost import CostModel
from edgellm.planner.inputs import SpanTable
from edgellm.planner.tables import Wanted
from edgellm.types import Epoch
from tests.brute import SETTINGS, Instance, best_value, random_instance, value

EPOCH = Epoch(1)
TIES = 1e-5
"""Seconds: more than all tie-breakers of a plan of five devices."""


def asked(one: Instance) -> Explained | None:
    try:
        return plan_for(
            one.card,
            one.offers,
            SETTINGS,
            EPOCH,
            one.situation,
            min_stages=one.min_stages,
            objective=one.objective,
            constraints=one.constraints,
        )
    except NoPlanError:
        return None


def check_equal(seed: int) -> None:
    one = random_instance(random.Random(seed))
    best, explained = best_value(one), asked(one)
    assert (best is None) == (explained is None), f"seed {seed}"
    if best is None or explained is None:
        return
    by_name = {offer.name: offer for offer in one.offers}
    split = [(by_name[stage.device], stage.span) for stage in explained.plan.stages]
    for offer, span in split:
        assert one.card.needs[span.first, span.end] <= offer.memory_bytes
        assert one.card.span_problem(span) is None
        assert len(span) >= one.constraints.min_layers
    used = {offer.name for offer, _ in split}
    assert len(used) == len(split) >= one.min_stages
    assert one.constraints.required <= used
    assert not one.constraints.forbidden & used
    played = play(one.card, SETTINGS, split, one.situation)
    assert explained.prediction.ttft_s == pytest.approx(played.ttft_s, rel=1e-9)
    assert explained.prediction.tpot_s == pytest.approx(played.tpot_s, rel=1e-9)
    assert explained.prediction.period_s == pytest.approx(played.period_s, rel=1e-9)
    found = value(one.objective, one.situation.workload, played)
    room = TIES + 1e-7 * best
    assert best - 1e-9 * best <= found <= best + room, f"seed {seed}: {found} against {best}"
    assert explained.least is not None
    assert explained.least <= best + 1e-9 * best
    assert explained.least >= found - room


@pytest.mark.parametrize("block", range(6))
def test_equal_to_trying_all_plans(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        check_equal(seed)


def test_equal_with_prices_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for six to ten devices: what the prices rule out is not the best."""
    monkeypatch.setattr(partition, "_UNPRICED", 0)
    for seed in range(200, 260):
        check_equal(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(20))
def test_equal_to_trying_all_plans_two_thousand_times(block: int) -> None:
    for seed in range(1000 + block * 100, 1100 + block * 100):
        check_equal(seed)


def plan_of(home: Home, objective: str) -> Explained:
    return plan_for(
        home.card,
        home.offers,
        home.settings,
        EPOCH,
        home.situation,
        objective=parse_objective(objective),
    )


def check_near(seed: int, objective: str) -> None:
    chance = random.Random(seed)
    home = random_office(chance, chance.randint(32, 64), HUGE)
    explained = plan_of(home, objective)
    assert explained.least is not None
    assert explained.value >= explained.least
    gap = explained.value / explained.least - 1
    assert gap <= 0.01, f"seed {seed}, {objective}: {gap:.2%}"


@pytest.mark.parametrize("objective", ["latency", "tpot", "ttft", "throughput"])
def test_an_office_is_near_the_bound(objective: str) -> None:
    check_near(1, objective)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("objective", ["latency", "tpot"])
def test_two_hundred_offices_are_near_the_bound(objective: str) -> None:
    for seed in range(200):
        check_near(seed, objective)


def test_a_bound_is_below_every_plan_that_is_tried() -> None:
    """The prices' bound against the exact search, where both can be had."""
    for seed in range(12):
        chance = random.Random(seed)
        home = random_office(chance, chance.randint(4, 8), MODELS[0])
        objective = parse_objective(("latency", "ttft", "tpot", "throughput")[seed % 4])
        told = home.situation
        cost = CostModel(
            SpanTable(home.card, home.settings),
            home.offers,
            told.links,
            told.workload,
            told.coordinator_id,
            objective,
        )
        exact = partition.partition_by_speed(cost, Wanted())
        many = partition.partition_of_many(cost, Wanted())
        assert (exact is None) == (many is None)
        if exact is None or many is None:
            continue
        best = cost.value(cost.predict(exact.shares))
        near = cost.value(cost.predict(many.shares))
        assert many.least is not None
        assert many.least <= best * (1 + 1e-9)
        assert best - 1e-4 <= near <= best * 1.02 + 1e-4


def test_ten_devices_and_eighty_layers_are_exact() -> None:
    """How long that takes is told by ``edgellm rivals --search``."""
    home = random_office(random.Random(3), 10, MODELS[-1])
    for objective in ("latency", "tpot", "ttft", "throughput"):
        explained = plan_of(home, objective)
        assert explained.least is not None
        assert explained.value <= explained.least * (1 + 1e-4), objective


@pytest.mark.slow
def test_sixty_four_devices_and_126_layers() -> None:
    for objective in ("latency", "tpot", "ttft", "throughput"):
        explained = plan_of(random_office(random.Random(5), 64, HUGE), objective)
        assert explained.least is not None
        assert explained.value <= explained.least * 1.01, objective
