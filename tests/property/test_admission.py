"""Slots and pages are never given out twice, the line is bounded, and everybody's turn comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import BusyError
from edgellm.scheduler.admission import (
    PATIENCE,
    Admission,
    Admit,
    Effect,
    Preempt,
    pages_of,
)

pytestmark = pytest.mark.pure

PAGES = 16


@given(data=st.data())
def test_nothing_is_given_out_twice_and_all_have_their_turn(data: st.DataObject) -> None:
    slots, line = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    pages = data.draw(st.sampled_from([0, PAGES]))
    admission = Admission(slots=slots, pages=pages, line=line)
    tokens: dict[int, int] = {}
    running: set[int] = set()
    ended: set[int] = set()
    now = 0.0

    def carry_out(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Admit):
                assert effect.ticket not in running | ended
                running.add(effect.ticket)
            else:
                running.remove(effect.ticket)
        assert len(running) <= slots
        assert running == admission.running
        if pages:
            assert sum(pages_of(tokens[ticket]) for ticket in running) <= pages
            assert admission.free_pages >= 0
        assert not (set(admission.waiting) & running)
        if admission.waiting:
            assert running, "where nobody runs, nobody waits"

    for ticket in range(data.draw(st.integers(1, 30))):
        now += 1.0
        tokens[ticket] = data.draw(st.integers(1, 500), label="tokens")
        waited = len(admission.waiting)
        try:
            carry_out(admission.arrive(ticket, tokens[ticket], data.draw(st.integers(0, 2)), now))
        except BusyError as busy:
            assert waited >= line
            assert busy.retry_after_s >= 1.0
            ended.add(ticket)
        for _ in range(data.draw(st.integers(0, 3))):
            if not running:
                break
            chosen = data.draw(st.sampled_from(sorted(running)))
            grows: bool = data.draw(st.booleans())
            if grows:
                tokens[chosen] = min(tokens[chosen] + 64, PAGES * 64)
                carry_out(admission.grow(chosen, tokens[chosen], now))
            else:
                running.discard(chosen)
                ended.add(chosen)
                carry_out(admission.leave(chosen, now))
        waiting = sorted(admission.waiting)
        gives_up: bool = data.draw(st.booleans())
        if waiting and gives_up:
            given_up = data.draw(st.sampled_from(waiting))
            ended.add(given_up)
            carry_out(admission.leave(given_up, now))
    while running:
        first = min(running)
        running.discard(first)
        ended.add(first)
        carry_out(admission.leave(first, now))
        assert admission.leave(first, now) == []
    assert ended == set(tokens)


def test_higher_priorities_take_the_place_of_the_youngest_of_the_lowest() -> None:
    admission = Admission(slots=2, pages=0, line=8)
    assert admission.arrive(1, 5, 0, 0.0) == [Admit(1)]
    assert admission.arrive(2, 5, 0, 0.0) == [Admit(2)]
    assert admission.arrive(3, 5, 0, 0.0) == []
    assert admission.arrive(4, 5, 1, 0.0) == [Preempt(2), Admit(4)]
    assert admission.waiting == (2, 3), "it waits at its old place"
    assert admission.leave(4, 1.0) == [Admit(2)]
    assert admission.arrive(5, 5, -1, 1.0) == []
    assert admission.leave(1, 1.0) == [Admit(3)]
    assert admission.leave(2, 1.0) == [Admit(5)]


def test_whoever_was_overtaken_often_is_next_and_stays() -> None:
    admission = Admission(slots=1, pages=0, line=8)
    admission.arrive(0, 5, 5, 0.0)
    assert admission.arrive(1, 5, 0, 0.0) == []
    for ticket in range(2, 2 + PATIENCE):
        assert admission.arrive(ticket, 5, 5, 0.0) == []
        assert admission.leave(ticket - 1 if ticket > 2 else 0, 0.0) == [Admit(ticket)]
    assert admission.arrive(100, 5, 5, 0.0) == []
    assert admission.leave(1 + PATIENCE, 0.0) == [Admit(1)]
    assert admission.arrive(101, 5, 9, 0.0) == [], "and is not put back at once"


def test_pages_that_run_out_cost_the_youngest_its_own_and_it_comes_back() -> None:
    admission = Admission(slots=4, pages=7, line=8)
    assert admission.arrive(1, 100, 0, 0.0) == [Admit(1)]
    assert admission.arrive(2, 100, 0, 0.0) == [Admit(2)]
    assert admission.arrive(3, 60, 0, 0.0) == [], "there would be no room to grow"
    assert admission.free_pages == 3
    assert admission.grow(1, 300, 0.0) == []
    assert admission.grow(2, 200, 0.0) == [Preempt(2)]
    assert admission.waiting == (2, 3)
    assert admission.grow(1, 400, 0.0) == []
    assert admission.leave(1, 0.0) == [Admit(2), Admit(3)]


def test_a_full_line_says_when_to_come_again() -> None:
    admission = Admission(slots=2, pages=0, line=1)
    for ticket in range(3):
        admission.arrive(ticket, 5, 0, 0.0)
    for ticket in range(60):  # requests take 40 s each: a place every 20 s
        admission.leave(ticket, 20.0 * (ticket + 1))
        admission.arrive(ticket + 3, 5, 0, 20.0 * (ticket + 1))
    with pytest.raises(BusyError, match="1 requests wait") as busy:
        admission.arrive(10_000, 5, 0, 0.0)
    assert 15.0 <= busy.value.retry_after_s <= 21.0
    assert 10_000 not in admission.waiting
