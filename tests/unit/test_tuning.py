"""The parts of tuning by themselves: links from counters, plans near a plan, seconds."""

from __future__ import annotations

import pytest

from edgellm.errors import SplitError
from edgellm.modelref import open_reference
from edgellm.planner import (
    Constraints,
    DeviceOffer,
    DeviceSpeed,
    Situation,
    parse_objective,
    plan_for,
)
from edgellm.planner.looks import link_of
from edgellm.planner.plans import plan_of
from edgellm.planner.shifts import shares_of, shifted
from edgellm.tuning import weight_of_a_request
from edgellm.types import DeviceId, EngineSettings, Epoch

CARD = open_reference("stub:12").card
OFFERS = [
    DeviceOffer(name, DeviceId(name * 64), 8 << 20, DeviceSpeed(speed, speed * 10))
    for name, speed in (("a", 1e10), ("b", 8e9), ("c", 1e9))
]


def test_links_from_counters() -> None:
    before = {"next_trips": 10, "next_trips_s": 0.1}
    after = {"next_trips": 14, "next_trips_s": 0.116}
    trip_s, flow = link_of(before, after)
    assert trip_s == pytest.approx(0.004) and flow is None
    assert link_of(after, after) == (None, None)
    bulk = {"next_bulks": 2, "next_bulks_s": 0.048, "next_bulks_bytes": 400_000}
    trip_s, flow = link_of(before, {**after, **bulk})
    assert trip_s == pytest.approx(0.004) and flow == pytest.approx(200_000 / 0.020)
    quick = {"next_bulks": 2, "next_bulks_s": 0.003, "next_bulks_bytes": 400_000}
    assert link_of(before, {**after, **quick})[1] is None


def test_plans_near_a_plan() -> None:
    made = plan_for(CARD, OFFERS, EngineSettings(), Epoch(1), min_stages=2)
    cost = made.question.cost
    wanted = made.question.wanted(cost)
    shares = shares_of(cost, made.plan)
    assert plan_of(cost, shares, Epoch(1), made.plan.why) == made.plan
    near = list(shifted(cost, wanted, shares))
    assert near and len(set(near)) == len(near) and shares not in near
    for other in near:
        assert all(map(cost.fits, other))
        assert other[0].first == 0 and other[-1].end == 12
        assert len({share.device for share in other}) == len(other) == 2
        changed = {(share.first, share.end) for share in other}
        assert len(changed - {(share.first, share.end) for share in shares}) == 2


def test_plans_near_a_plan_are_as_wanted() -> None:
    asked = Constraints(required=frozenset({"c"}), min_layers=3)
    made = plan_for(CARD, OFFERS, EngineSettings(), Epoch(1), constraints=asked)
    cost = made.question.cost
    near = list(shifted(cost, made.question.wanted(cost), shares_of(cost, made.plan)))
    assert near
    for other in near:
        assert 2 in {share.device for share in other}
        assert min(share.end - share.first for share in other) >= 3


def test_a_plan_of_other_devices_has_no_shares() -> None:
    made = plan_for(CARD, OFFERS, EngineSettings(), Epoch(1))
    without = plan_for(CARD, OFFERS[::2], EngineSettings(), Epoch(1)).question.cost
    with pytest.raises(SplitError):
        shares_of(without, made.plan)


@pytest.mark.parametrize(
    ("objective", "weight"),
    [("latency", 1), ("ttft", 1), ("tpot", 1), ("throughput", 1), ("ttft=2,tpot=254", 2)],
)
def test_values_as_the_seconds_of_a_request(objective: str, weight: float) -> None:
    made = plan_for(
        CARD,
        OFFERS,
        EngineSettings(),
        Epoch(1),
        Situation(),
        objective=parse_objective(objective),
    )
    assert weight_of_a_request(made.question.cost) == pytest.approx(weight)
