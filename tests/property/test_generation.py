"""Whatever comes back from a pipeline, in whatever order and however often, one answer results."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.scheduler.generation import (
    TOKENS_A_CHUNK,
    Effect,
    Emit,
    Finish,
    Generation,
    SendStep,
)
from edgellm.types import FinishReason

pytestmark = pytest.mark.pure

VOCABULARY = 40
STOP_TOKEN = 39


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    max_tokens: int
    chunk: int
    window: int
    context: int
    stops: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prompt = tuple(draw(st.lists(st.integers(0, 38), min_size=1, max_size=40)))
    return Case(
        prompt=prompt,
        max_tokens=draw(st.integers(1, 20)),
        chunk=draw(st.integers(1, 16)),
        window=draw(st.integers(1, 5)),
        context=len(prompt) + draw(st.integers(0, 12)),
        stops=draw(st.booleans()),
    )


def next_token(tokens: Sequence[int]) -> int:
    """The model: a hash of everything before."""
    return hashlib.blake2b(bytes(tokens), digest_size=1).digest()[0] % VOCABULARY


def oracle(case: Case) -> tuple[list[int], FinishReason]:
    """The answer, said plainly."""
    tokens = list(case.prompt)
    while True:
        token = next_token(tokens)
        if case.stops and token == STOP_TOKEN:
            return tokens, FinishReason.STOP
        tokens.append(token)
        if len(tokens) - len(case.prompt) == case.max_tokens or len(tokens) > case.context:
            return tokens, FinishReason.LENGTH


@dataclass
class Pipeline:
    """Answers steps from what was sent, and keeps the rules that every effect must obey."""

    case: Case
    generation: Generation
    in_flight: deque[SendStep] = field(default_factory=deque)
    shown: list[int] = field(default_factory=list)
    finished: FinishReason | None = None
    sent: int = 0
    window: int | None = None
    """Of the pipeline of the moment, where it is another one than the case's."""

    def carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            assert self.finished is None, "nothing follows the end"
            if isinstance(effect, SendStep):
                assert effect.position == self.sent, "steps follow one another"
                self.sent += effect.count
                assert self.sent <= len(self.generation.tokens), "only the journal is sent"
                assert self.sent <= self.case.context
                self.in_flight.append(effect)
                self.check_window()
                assert effect.count <= self.case.chunk or effect.count == 1
            elif isinstance(effect, Emit):
                assert self.generation.tokens[effect.position] == effect.token
                assert effect.position == len(self.case.prompt) + len(self.shown)
                self.shown.append(effect.token)
            elif isinstance(effect, Finish):
                self.finished = effect.reason

    def check_window(self) -> None:
        window = self.window or self.case.window
        replays = self.window is not None and all(step.count == 1 for step in self.in_flight)
        assert len(self.in_flight) <= window * (TOKENS_A_CHUNK if replays else 1)

    def replaced(self, position: int, window: int, exact: bool) -> None:
        """Another pipeline, which holds the tokens before ``position``."""
        self.in_flight.clear()
        self.sent, self.window = position, window
        self.carry_out(self.generation.resume(window=window, position=position, exact=exact))

    def answer(self, step: SendStep) -> tuple[int, int]:
        end = step.position + step.count
        return end - 1, next_token(self.generation.tokens[:end]) if step.output else -1


@given(case=cases(), data=st.data())
def test_stale_and_repeated_results_never_change_the_answer(
    case: Case, data: st.DataObject
) -> None:
    stops = frozenset({STOP_TOKEN}) if case.stops else frozenset()
    generation = Generation(
        case.prompt,
        max_tokens=case.max_tokens,
        chunk=case.chunk,
        window=case.window,
        context=case.context,
        stop_tokens=stops,
    )
    pipeline = Pipeline(case, generation)
    pipeline.carry_out(generation.begin())
    given_before: list[tuple[int, int]] = []
    while pipeline.finished is None:
        journal = list(generation.tokens)
        expected = pipeline.answer(pipeline.in_flight[0])
        for position, token in data.draw(noise(given_before, expected, len(journal))):
            assert generation.on_result(position, token) == []
            assert generation.tokens == journal
        pipeline.in_flight.popleft()
        given_before.append(expected)
        pipeline.carry_out(generation.on_result(*expected))
        assert generation.tokens[: len(journal)] == journal, "the journal only grows"
    tokens, reason = oracle(case)
    assert generation.tokens == tokens
    assert pipeline.shown == tokens[len(case.prompt) :]
    assert pipeline.finished is reason
    assert all(generation.on_result(*result) == [] for result in given_before)


def noise(
    before: list[tuple[int, int]], expected: tuple[int, int], length: int
) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Results that were given before, of positions that are not next, or of the wrong kind."""
    position, token = expected
    wrong_kind = (position, -1 if token >= 0 else 5)
    elsewhere = st.tuples(
        st.integers(0, length + 50).filter(lambda at: at != position), st.integers(-1, 38)
    )
    # A position is answered once only: an earlier result can never be the next one.
    return st.lists(st.sampled_from([*before, wrong_kind]) | elsewhere, max_size=4)


@given(case=cases(), data=st.data())
def test_any_number_of_losses_at_any_moment_never_change_the_answer(
    case: Case, data: st.DataObject
) -> None:
    generation = Generation(
        case.prompt,
        max_tokens=case.max_tokens,
        chunk=case.chunk,
        window=case.window,
        context=case.context,
        stop_tokens=frozenset({STOP_TOKEN}) if case.stops else frozenset(),
    )
    pipeline = Pipeline(case, generation)
    pipeline.carry_out(generation.begin())
    losses = data.draw(st.lists(st.integers(0, 8), max_size=6))
    exact = data.draw(st.booleans())
    while pipeline.finished is None:
        if losses and losses[-1] == 0:
            losses.pop()
            journal, shown = list(generation.tokens), list(pipeline.shown)
            position = data.draw(st.sampled_from([0, generation.acknowledged]))
            pipeline.replaced(position, data.draw(st.integers(1, 5)), exact)
            assert (generation.tokens, pipeline.shown) == (journal, shown)
            if exact:
                for step in pipeline.in_flight:
                    where = step.position
                    inside = where < len(case.prompt)
                    assert where % case.chunk == 0 if inside else step.count == 1
            continue
        if losses:
            losses[-1] -= 1
        pipeline.carry_out(generation.on_result(*pipeline.answer(pipeline.in_flight.popleft())))
    tokens, reason = oracle(case)
    assert generation.tokens == tokens
    assert pipeline.shown == tokens[len(case.prompt) :]
    assert pipeline.finished is reason


@given(case=cases(), after=st.integers(0, 10), reason=st.sampled_from(FinishReason))
def test_after_a_stop_nothing_comes(case: Case, after: int, reason: FinishReason) -> None:
    generation = Generation(
        case.prompt,
        max_tokens=case.max_tokens,
        chunk=case.chunk,
        window=case.window,
        context=case.context,
    )
    pipeline = Pipeline(case, generation)
    pipeline.carry_out(generation.begin())
    for _ in range(after):
        if pipeline.finished is None:
            step = pipeline.in_flight.popleft()
            pipeline.carry_out(generation.on_result(*pipeline.answer(step)))
    ended = pipeline.finished is not None
    journal = list(generation.tokens)
    assert generation.stop(reason) == ([] if ended else [Finish(reason)])
    for step in pipeline.in_flight:
        assert generation.on_result(*pipeline.answer(step)) == []
    assert generation.tokens == journal
    full, _ = oracle(Case(**{**vars(case), "stops": False}))
    assert full[: len(journal)] == journal, "what was shown stays true"
