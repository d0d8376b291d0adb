"""Which rows share a decode call: every row once, within the call's capacity, in a kept order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.engine.base import SlotRow
from edgellm.engine.grouping import decode_groups

pytestmark = pytest.mark.pure


def rows_of(*counts: int, slots: tuple[int, ...] = ()) -> list[SlotRow]:
    slots = slots or tuple(range(len(counts)))
    return [SlotRow(slot, 0, count, True) for slot, count in zip(slots, counts, strict=True)]


def test_nothing_is_joined_in_reference_mode() -> None:
    assert decode_groups(rows_of(1, 1, 1), "none", 8) == [[0], [1], [2]]


def test_any_rows_share_a_call_in_order() -> None:
    assert decode_groups(rows_of(5, 2, 1), "any", 8) == [[0, 1, 2]]
    assert decode_groups(rows_of(5, 2, 2), "any", 8) == [[0, 1], [2]]
    assert decode_groups(rows_of(8, 8, 1), "any", 8) == [[0], [1], [2]]


def test_rows_of_equal_length_share_a_call_in_the_order_of_slots() -> None:
    rows = rows_of(1, 3, 1, 3, 1, slots=(4, 0, 2, 1, 3))
    assert decode_groups(rows, "equal", 8) == [[2, 4, 0], [1, 3]]
    assert decode_groups(rows, "equal", 3) == [[2, 4, 0], [1], [3]]


@pytest.mark.parametrize("joint", ["any", "equal", "none"])
def test_one_row_is_one_call(joint: str) -> None:
    assert decode_groups(rows_of(4), joint, 4) == [[0]]


@given(
    counts=st.lists(st.integers(1, 16), min_size=1, max_size=24),
    joint=st.sampled_from(["any", "equal", "none"]),
    capacity=st.integers(16, 64),
    order=st.randoms(use_true_random=False),
)
def test_every_row_once_and_never_over_capacity(
    counts: list[int], joint: str, capacity: int, order: object
) -> None:
    slots = list(range(len(counts)))
    order.shuffle(slots)  # type: ignore[attr-defined]
    rows = rows_of(*counts, slots=tuple(slots))
    groups = decode_groups(rows, joint, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        assert group
        assert sum(rows[index].count for index in group) <= capacity
        if joint == "none":
            assert len(group) == 1
        elif joint == "any":
            assert group == sorted(group)
        else:
            assert len({rows[index].count for index in group}) == 1
            held = [rows[index].slot for index in group]
            assert held == sorted(held)
    if joint == "any":
        assert [index for group in groups for index in group] == list(range(len(rows)))
        for one, other in pairwise(groups):  # no call is left half empty
            assert sum(rows[i].count for i in one) + rows[other[0]].count > capacity
