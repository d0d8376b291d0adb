"""Which way a model goes on after a loss: by estimated seconds."""

from __future__ import annotations

import dataclasses

import pytest

from edgellm.scheduler.recovery import (
    LOAD_BYTES_PER_S,
    REBIND_S,
    START_S,
    Journal,
    Kind,
    StageCost,
    choose,
    load_s,
    replay_s,
)

pytestmark = pytest.mark.pure

GIB = 1 << 30
STAGE = StageCost(
    fresh=True,
    load_bytes=GIB,
    fetch_bytes=0,
    fetch_bytes_per_s=100e6,
    decode_s=0.05,
    chunk_s=0.5,
    row_s=1e-4,
)
KEPT = dataclasses.replace(STAGE, fresh=False)
SHORT = Journal(prompt=100, made=0, chunk=64)
LONG = Journal(prompt=1000, made=1000, chunk=64)


def stage(**changes: object) -> StageCost:
    return dataclasses.replace(STAGE, **changes)  # type: ignore[arg-type]


def test_stages_load_at_the_same_time() -> None:
    assert load_s([]) == 0
    assert load_s([KEPT, KEPT]) == REBIND_S
    assert load_s([STAGE, KEPT]) == START_S + GIB / LOAD_BYTES_PER_S
    fetched = stage(fetch_bytes=GIB)
    assert load_s([STAGE, fetched]) == pytest.approx(START_S + GIB / LOAD_BYTES_PER_S + GIB / 100e6)


def test_only_fresh_stages_compute_again() -> None:
    assert replay_s([KEPT, KEPT], [LONG], exact=True) == 0
    assert replay_s([STAGE, STAGE], [], exact=True) == 0
    alone = replay_s([KEPT, STAGE, KEPT], [LONG], exact=True)
    assert alone == pytest.approx(16 * 0.5 + 1000 * 0.05 + 0.5)
    # a pipeline is as fast as its slowest stage, and has to be filled
    assert replay_s([STAGE] * 3, [LONG], exact=True) == pytest.approx(alone + 1.0)
    assert replay_s([STAGE, stage(decode_s=0.1)], [LONG], exact=True) > alone + 40


def test_what_was_made_goes_in_chunks_where_bits_do_not_matter() -> None:
    fast = replay_s([STAGE], [LONG], exact=False)
    assert fast == pytest.approx(32 * 0.5 + 0.5)
    assert fast < replay_s([STAGE], [LONG], exact=True)


def test_several_requests_are_computed_one_after_another() -> None:
    one = replay_s([STAGE], [SHORT], exact=True)
    assert replay_s([STAGE], [SHORT, SHORT], exact=True) == pytest.approx(2 * one - 0.5)


def test_a_slow_link_holds_a_fast_stage_up() -> None:
    slow = stage(row_s=0.1)
    assert replay_s([slow], [SHORT], exact=True) == pytest.approx(100 * 0.1 + 0.5)


def test_the_lost_layers_alone_are_less_work() -> None:
    choice = choose([STAGE] * 3, [KEPT, STAGE, KEPT], [LONG], exact=True, lost="b")
    assert choice.kind is Kind.ROWS
    assert choice.reason.startswith("b was lost: its layers alone anew take about ")
    assert "all stages" in choice.reason
    # equal: what moves less
    assert choose([STAGE], [STAGE], [], exact=True, lost="b").kind is Kind.ROWS


def test_all_stages_anew_where_the_spare_device_would_have_to_fetch_for_long() -> None:
    """The others have most of the lost layers on their disks."""
    far = stage(fetch_bytes=10 * GIB)
    near = [stage(fetch_bytes=GIB // 10)] * 2
    choice = choose(near, [KEPT, far, KEPT], [SHORT], exact=True, lost="b")
    assert choice.kind is Kind.REPLAY
    assert "all stages anew take about" in choice.reason
    # a long journal, and a slow stage for it, turn that around
    slow = [stage(decode_s=0.5)] * 2
    assert choose(slow, [KEPT, far, KEPT], [LONG], exact=True, lost="b").kind is Kind.ROWS


def test_one_way_alone_is_taken() -> None:
    assert choose([STAGE], None, [LONG], exact=True, lost="b").kind is Kind.REPLAY
    assert choose(None, [KEPT, STAGE], [LONG], exact=True, lost="b").kind is Kind.ROWS
