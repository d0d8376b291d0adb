"""One request's state machine: results in, effects out."""

from __future__ import annotations

import pytest

from edgellm.errors import LocalProtocolError
from edgellm.scheduler.generation import (
    Emit,
    Finish,
    Generation,
    Phase,
    SendStep,
    chunk_spans,
    prompt_chunk,
)
from edgellm.types import FinishReason

pytestmark = pytest.mark.pure


def generation(
    prompt: int = 10,
    *,
    max_tokens: int = 4,
    chunk: int = 4,
    window: int = 2,
    context: int = 100,
    stop_tokens: tuple[int, ...] = (),
) -> Generation:
    return Generation(
        tuple(range(prompt)),
        max_tokens=max_tokens,
        chunk=chunk,
        window=window,
        context=context,
        stop_tokens=frozenset(stop_tokens),
    )


def phase_of(one: Generation) -> Phase:
    """Asked anew each time: what a call changes looks settled to mypy after an assert."""
    return one.phase


def test_chunks_depend_on_two_numbers_alone() -> None:
    assert chunk_spans(10, 4) == [(0, 4), (4, 4), (8, 2)]
    assert chunk_spans(8, 4) == [(0, 4), (4, 4)]
    assert chunk_spans(1, 4) == [(0, 1)]


def test_a_whole_request() -> None:
    one = generation()
    assert one.begin() == [SendStep(0, 4, False), SendStep(4, 4, False)]
    assert phase_of(one) is Phase.PREFILL
    assert one.on_result(3, -1) == [SendStep(8, 2, True)]
    assert one.on_result(7, -1) == []
    # the next step leaves before its token is shown; the journal has it already
    assert one.on_result(9, 50) == [SendStep(10, 1, True), Emit(10, 50)]
    assert phase_of(one) is Phase.DECODE
    assert one.tokens[10] == 50
    assert one.on_result(10, 51) == [SendStep(11, 1, True), Emit(11, 51)]
    assert one.on_result(11, 52) == [SendStep(12, 1, True), Emit(12, 52)]
    assert one.on_result(12, 53) == [Emit(13, 53), Finish(FinishReason.LENGTH)]
    assert one.made == (50, 51, 52, 53)
    assert phase_of(one) is Phase.DONE


@pytest.mark.parametrize(("window", "first"), [(1, 1), (2, 2), (3, 3), (9, 3), (0, 1)])
def test_the_window_bounds_what_is_in_flight(window: int, first: int) -> None:
    assert len(generation(window=window).begin()) == first


def test_one_token_asked_for_is_one_token() -> None:
    one = generation(3, max_tokens=1)
    one.begin()
    assert one.on_result(2, 9) == [Emit(3, 9), Finish(FinishReason.LENGTH)]


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it() -> None:
    one = generation(3, stop_tokens=(7,))
    one.begin()
    one.on_result(2, 9)
    assert one.on_result(3, 7) == [Finish(FinishReason.STOP)]
    assert one.made == (9,)
    at_once = generation(3, stop_tokens=(7,))
    at_once.begin()
    assert at_once.on_result(2, 7) == [Finish(FinishReason.STOP)]
    assert at_once.made == ()


def test_a_full_context_ends_the_answer() -> None:
    """The last token needs no cell: it is shown, but never computed on."""
    one = generation(9, context=10, max_tokens=50)
    one.begin()
    one.on_result(3, -1)
    one.on_result(7, -1)
    assert one.on_result(8, 60) == [SendStep(9, 1, True), Emit(9, 60)]
    assert one.on_result(9, 61) == [Emit(10, 61), Finish(FinishReason.LENGTH)]
    full = generation(10, context=10)
    full.begin()
    full.on_result(3, -1)
    full.on_result(7, -1)
    assert full.on_result(9, 60) == [Emit(10, 60), Finish(FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("position", "token"),
    [(0, -1), (4, -1), (7, -1), (3, 5), (9, 50), (-1, -1), (1000, 3)],
)
def test_a_result_that_is_not_the_next_has_no_effect(position: int, token: int) -> None:
    one = generation()
    one.begin()
    before = list(one.tokens)
    assert one.on_result(position, token) == []
    assert one.tokens == before
    assert one.on_result(3, -1) == [SendStep(8, 2, True)]  # and the next one still has its own


def test_a_repeated_result_has_no_effect() -> None:
    one = generation()
    one.begin()
    one.on_result(3, -1)
    assert one.on_result(3, -1) == []
    one.on_result(7, -1)
    one.on_result(9, 50)
    assert one.on_result(9, 50) == []
    assert one.on_result(9, 51) == []
    assert one.made == (50,)


def test_stop_ends_it_once() -> None:
    one = generation()
    one.begin()
    assert one.stop(FinishReason.CANCELLED) == [Finish(FinishReason.CANCELLED)]
    assert one.stop(FinishReason.STOP) == []
    assert one.on_result(3, -1) == []
    assert one.made == ()


def test_misuse_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        generation(0)
    with pytest.raises(LocalProtocolError):
        generation(101)
    one = generation()
    one.begin()
    with pytest.raises(LocalProtocolError):
        one.begin()


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 64), (512, 64), (1024, 64), (1536, 96), (2040, 128), (100_000, 128)]
)
def test_the_chunk_of_a_prompt_depends_on_its_length_alone(length: int, chunk: int) -> None:
    assert prompt_chunk(length, most=128) == chunk


def test_a_chunk_that_was_told_is_kept_within_the_engine_s_limit() -> None:
    assert prompt_chunk(2040, most=128, told=32) == 32
    assert prompt_chunk(2040, most=128, told=500) == 128
    assert prompt_chunk(2040, most=16) == 16
