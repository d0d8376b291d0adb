"""When a move pays: clearly better, soon enough, and not back and forth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.planner.worth import (
    BETTER,
    COOLDOWN_S,
    FAILED_S,
    KEEP_AWAY_S,
    MOST_REQUESTS,
    PAYS,
    Outlay,
    Record,
    Usual,
    worth_moving,
)
from edgellm.types import DeviceId, Epoch, LayerSpan, Plan, Stage

pytestmark = pytest.mark.pure


def plan(**layers: int) -> Plan:
    """``plan(a=3, b=5)``: in this order."""
    stages, at = [], 0
    for device, count in layers.items():
        stages.append(Stage(device, DeviceId(device * 64), LayerSpan(at, at + count), 1 << 20))
        at += count
    return Plan(Epoch(1), at, tuple(stages))


def test_a_move_that_pays() -> None:
    verdict = worth_moving(1.9, 1.2, Outlay(2.8), 10)
    assert verdict.worth
    assert verdict.reason == (
        "a request takes 1.20 s instead of 1.90 s; moving takes about 2.80 s, which 4 requests"
        " make good"
    )
    assert verdict.net_s == pytest.approx(7 - 2.8)


def test_too_little_too_dear_too_soon_and_nothing_better() -> None:
    assert "too little to move for (5%)" in worth_moving(1.0, 0.95, Outlay(0.1), 64).reason
    dear = worth_moving(1.0, 0.5, Outlay(3.0, replay_s=1.0), 3)
    assert not dear.worth
    assert dear.reason.endswith("which 8 requests would make good, and 3 are expected")
    assert worth_moving(1.0, 0.5, Outlay(0.1), 3, "layers moved 5 s ago").reason.endswith(
        "but layers moved 5 s ago"
    )
    for better in (1.0, 1.5, float("nan"), 0.0):
        assert not worth_moving(1.0, better, Outlay(0.0), 64).worth


@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.floats(0, 1e4),
    st.integers(1, MOST_REQUESTS),
)
def test_a_move_is_made_only_where_it_pays(
    present_s: float, better_s: float, move_s: float, requests: int
) -> None:
    verdict = worth_moving(present_s, better_s, Outlay(move_s), requests)
    pays = (present_s - better_s) * requests >= PAYS * move_s
    clearly = better_s < present_s and (present_s - better_s) / present_s >= BETTER
    assert verdict.worth is (pays and clearly)
    assert verdict.reason


def test_what_is_usual() -> None:
    """The mean, with more weight for what came last, and no more than so much of it expected."""
    usual = Usual().after(1, 40, 40, 10)
    usual = usual.after(0, 0, 0, 5)
    assert (usual.prompt_tokens, usual.made, usual.expected) == (40, 15, 1)
    for _ in range(30):
        usual = usual.after(2, 200, 50, 60)  # of two prompts of 100 tokens, 25 were new each
    assert usual.prompt_tokens == pytest.approx(25, rel=0.01)
    assert usual.held_tokens == pytest.approx(75, rel=0.01)
    assert usual.made == pytest.approx(30, rel=0.01)
    assert usual.requests == 61 and usual.expected == 61
    assert usual.after(100, 100, 100, 100).expected == MOST_REQUESTS


def test_no_move_back_and_none_right_after_another() -> None:
    even, uneven, others = plan(a=4, b=4), plan(a=6, b=2), plan(b=2, a=5, c=1)
    record = Record()
    assert record.refusal(even, uneven, 0.0) == ""
    record = record.after(even, uneven, 100.0)
    assert record.refusal(uneven, even, 110.0) == "layers moved 10 s ago"
    later = 101.0 + COOLDOWN_S
    assert record.refusal(uneven, even, later) == "b gave up layers not long ago"
    assert record.refusal(uneven, others, later) == ""
    assert record.refusal(uneven, even, 101.0 + KEEP_AWAY_S) == ""
    # It gives them up once more: now it waits for twice as long.
    record = record.after(even, uneven, 2000.0)
    assert record.refusal(uneven, even, 2001.0 + KEEP_AWAY_S) != ""
    assert record.refusal(uneven, even, 2001.0 + 2 * KEEP_AWAY_S) == ""


def test_a_device_that_was_left_out_is_not_asked_back_at_once() -> None:
    record = Record().after(plan(a=4, b=4), plan(a=8), 0.0)
    assert record.refusal(plan(a=8), plan(b=1, a=7), 2 * COOLDOWN_S) != ""
    assert record.refusal(plan(a=8), plan(c=1, a=7), 2 * COOLDOWN_S) == ""


def test_failures_wait_longer_and_longer() -> None:
    old, new = plan(a=4, b=4), plan(a=6, b=2)
    record = Record().failed(0.0)
    assert record.refusal(old, new, FAILED_S - 1) == "the last move failed 119 s ago"
    assert record.refusal(old, new, FAILED_S) == ""
    record = record.failed(FAILED_S)
    assert record.refusal(old, new, 2 * FAILED_S) != ""
    assert record.refusal(old, new, 3 * FAILED_S) == ""
    assert record.after(old, new, 1000.0).failures == 0
