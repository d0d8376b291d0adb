"""Whatever requests come, go and are given up, every micro-batch keeps its rules, and all end."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import LocalProtocolError
from edgellm.scheduler.batching import PATIENCE, PREFILL_BESIDE, Batcher, Part
from edgellm.scheduler.generation import (
    TOKENS_A_CHUNK,
    Effect,
    Emit,
    Finish,
    Generation,
    SendStep,
)

pytestmark = pytest.mark.pure


@dataclass(frozen=True)
class Asked:
    prompt: int
    count: int
    chunk: int
    priority: int
    begins: int
    """After so many answers of all requests together."""
    cancelled: int | None
    """After so many of its own tokens."""
    replays: int
    """Tokens that it has made already, elsewhere: they go one by one, as in reference mode."""


@st.composite
def asked(draw: st.DrawFn, budget: int) -> Asked:
    return Asked(
        prompt=draw(st.integers(1, 60)),
        count=draw(st.integers(1, 12)),
        chunk=draw(st.integers(1, budget)),
        priority=draw(st.integers(-1, 1)),
        begins=draw(st.integers(0, 40)),
        cancelled=draw(st.none() | st.integers(0, 8)),
        replays=draw(st.integers(0, 6)),
    )


@dataclass
class Service:
    """Requests over a pipeline of ``depth`` stages, each micro-batch whole or row by row."""

    depth: int
    budget: int
    divides: bool
    requests: Sequence[Asked]
    generations: dict[int, Generation] = field(default_factory=dict)
    shown: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    sent: dict[int, int] = field(default_factory=dict)
    """How far each sequence was sent: rows follow one another without a gap."""
    flights: deque[list[Part]] = field(default_factory=deque)
    answers: int = 0
    passed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batcher = Batcher(depth=self.depth, budget=self.budget, divides=self.divides)

    def begin_due(self) -> None:
        for number, request in enumerate(self.requests):
            if number in self.generations or (request.begins > self.answers and self.flights):
                continue
            generation = Generation(
                tuple(range(request.prompt)),
                max_tokens=request.count + request.replays,
                chunk=request.chunk,
                window=1,
                context=1000,
            )
            generation.tokens += range(request.replays)
            self.generations[number] = generation
            self.shown[number], self.sent[number] = [], 0
            self.carry_out(number, generation.resume(window=self.depth + 1))
            self.send()

    def carry_out(self, number: int, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendStep):
                self.batcher.add(number, effect, self.requests[number].priority)
            elif isinstance(effect, Emit):
                self.shown[number].append(effect.position)
                if len(self.shown[number]) == self.requests[number].cancelled:
                    self.end(number)
                    return
            elif isinstance(effect, Finish):
                self.end(number)

    def end(self, number: int) -> None:
        self.ended.add(number)
        self.batcher.drop(number)
        self.flights = deque(
            rest
            for flight in self.flights
            if (rest := [part for part in flight if part.sequence != number])
        )

    def send(self) -> None:
        while parts := self.batcher.next():
            self.check(parts)
            self.flights.append(list(parts))
            assert self.batcher.in_flight == sum(map(len, self.flights))
        if not self.flights:
            assert not self.batcher.waiting, "what is ready leaves where nothing is on its way"

    def check(self, parts: Sequence[Part]) -> None:
        assert sum(part.count for part in parts) <= self.budget
        assert len({part.sequence for part in parts}) == len(parts)
        for part in parts:
            assert part.sequence not in self.ended, "nothing is sent for who has ended"
            assert part.position == self.sent[part.sequence], "in order, without a gap"
            assert part.count >= 1
            self.sent[part.sequence] += part.count
            generation = self.generations[part.sequence]
            end = part.position + part.count
            wanted = end == len(generation.tokens)
            assert part.output == wanted, "a token is wanted after the last one that is known"
            if not self.divides and part.position < generation.prompt_length:
                whole = min(generation.chunk, generation.prompt_length - part.position)
                assert part.position % generation.chunk == 0
                assert part.count == whole, "chunks decide bits"

    def answer(self, whole: bool) -> None:
        """The oldest micro-batch comes back, or its first row alone."""
        parts = self.flights[0] if whole else self.flights[0][:1]
        for part in list(parts):
            if part.sequence in self.ended:
                continue
            last = part.position + part.count - 1
            self.flights[0].remove(part)
            self.batcher.answered(part.sequence, last)
            token = 7 if part.output else -1
            generation = self.generations[part.sequence]
            self.answers += 1
            self.carry_out(part.sequence, generation.on_result(last, token))
        if self.flights and not self.flights[0]:
            self.flights.popleft()
        self.send()


@given(data=st.data())
def test_all_requests_end_in_order_within_budget(data: st.DataObject) -> None:
    budget = data.draw(st.sampled_from([1, 4, 16, 128]))
    service = Service(
        depth=data.draw(st.integers(1, 4)),
        budget=budget,
        divides=data.draw(st.booleans()),
        requests=data.draw(st.lists(asked(budget), min_size=1, max_size=8)),
    )
    service.begin_due()
    while len(service.ended) < len(service.requests):
        if service.flights:
            service.answer(data.draw(st.booleans()))
        service.begin_due()
    assert service.batcher.in_flight == service.batcher.waiting == 0
    for number, request in enumerate(service.requests):
        begin = request.prompt + request.replays
        count = request.count
        if request.cancelled is not None and request.cancelled:
            count = min(count, request.cancelled)
        assert service.shown[number] == list(range(begin, begin + count))


@given(
    depth=st.integers(1, 4),
    budget=st.sampled_from([2, 16, 128]),
    divides=st.booleans(),
    requests=st.integers(2, 12),
    seed=st.integers(0, 1 << 30),
)
def test_what_is_in_flight_is_bounded_and_nobody_starves(
    depth: int, budget: int, divides: bool, requests: int, seed: int
) -> None:
    """However many chunks and tokens wait: with others around, what is ready leaves within some
    micro-batches, whatever priorities the others have."""
    chance = random.Random(seed)
    batcher = Batcher(depth=depth, budget=budget, divides=divides)
    positions = [0] * requests
    ready: dict[int, int] = {}
    flights: deque[tuple[Part, ...]] = deque()
    longest = 0
    for _ in range(100):
        for number, position in enumerate(positions):
            if number in ready or any(p.sequence == number for f in flights for p in f):
                continue
            single = chance.random() < 0.5
            count = 1 if single else chance.randint(1, budget)
            step = SendStep(position, count, single)
            batcher.add(number, step, chance.randint(0, 2))
            positions[number] += count
            ready[number] = 0
        while parts := batcher.next():
            assert sum(part.count for part in parts) <= budget
            flights.append(parts)
            for part in parts:
                if part.position + part.count == positions[part.sequence]:
                    del ready[part.sequence]
                else:
                    ready[part.sequence] = 0
            ready = {number: passed + 1 for number, passed in ready.items()}
            longest = max([longest, *ready.values()])
        heavy = [f for f in flights if any(part.output or part.count > 1 for part in f)]
        light = len(flights) - len(heavy)
        assert len(heavy) + light / TOKENS_A_CHUNK < 2 * depth + 2
        assert sum(any(p.output and p.count == 1 for p in f) for f in flights) <= depth
        for part in flights.popleft():
            batcher.answered(part.sequence, part.position + part.count - 1)
    # Those that were passed over as long, and came before it, go one by one at worst; tokens go
    # between two overdue chunks.
    assert longest <= 2 * (PATIENCE + requests) + depth


@given(
    streams=st.integers(1, 40),
    depth=st.integers(1, 6),
    seed=st.integers(0, 1 << 30),
)
def test_streams_settle_in_micro_batches_of_one_size(streams: int, depth: int, seed: int) -> None:
    """However they begin, as one convoy or one by one: then no stage waits for a larger one."""
    batcher = Batcher(depth=depth, budget=128, divides=True)
    flights: deque[tuple[Part, ...]] = deque()
    positions = [0] * streams
    shuffle = list(range(streams))
    random.Random(seed).shuffle(shuffle)
    groups = [shuffle[: streams // 2], shuffle[streams // 2 :]]
    for group in groups:
        for number in group:
            batcher.add(number, SendStep(0, 1, True))
            if len(group) % 2:
                flights.extend(iter(batcher.next, ()))
        flights.extend(iter(batcher.next, ()))
    sizes: list[int] = []
    for _ in range(40):
        parts = flights.popleft()
        sizes.append(len(parts))
        for part in parts:
            batcher.answered(part.sequence, part.position)
            positions[part.sequence] += 1
            batcher.add(part.sequence, SendStep(positions[part.sequence], 1, True))
        flights.extend(iter(batcher.next, ()))
        assert sum(map(len, flights)) + batcher.waiting == streams
    settled = sizes[-depth:]
    assert max(settled) == -(-streams // depth)
    assert max(positions) - min(positions) <= depth + 2


def test_a_request_that_is_alone_goes_through_unchanged() -> None:
    batcher = Batcher(depth=2, budget=128, divides=True)
    generation = Generation(tuple(range(500)), max_tokens=3, chunk=128, window=3, context=600)
    for effect in generation.begin():
        assert isinstance(effect, SendStep)
        batcher.add(1, effect)
        assert batcher.next() == (Part(1, effect.position, effect.count, effect.output),)
        assert batcher.next() == ()


def test_a_long_prompt_does_not_stop_others() -> None:
    batcher = Batcher(depth=2, budget=128, divides=True)
    batcher.add(1, SendStep(9, 1, True))
    assert batcher.next() == (Part(1, 9, 1, True),)
    for at in range(0, 384, 128):
        batcher.add(2, SendStep(at, 128, False))
    assert batcher.next() == (Part(2, 0, PREFILL_BESIDE, False),)
    assert batcher.next() == ()  # more would only lie before the other one's next token
    batcher.answered(1, 9)
    batcher.add(1, SendStep(10, 1, True))
    both = (Part(1, 10, 1, True), Part(2, PREFILL_BESIDE, PREFILL_BESIDE, False))
    assert batcher.next() == both


def test_the_last_token_of_a_divided_chunk_leaves_though_nobody_decodes() -> None:
    batcher = Batcher(depth=2, budget=128, divides=True)
    batcher.add(1, SendStep(9, 1, True))
    batcher.next()
    for sequence in (2, 3):
        batcher.add(sequence, SendStep(0, PREFILL_BESIDE + 1, True))
    assert batcher.next() == (Part(2, 0, PREFILL_BESIDE, False),)
    batcher.drop(1)
    left = {part.sequence: part for parts in iter(batcher.next, ()) for part in parts}
    assert left[2] == Part(2, PREFILL_BESIDE, 1, True)
    assert left[3].output
    assert batcher.waiting == 0


def test_whole_chunks_take_turns_with_tokens_where_bits_count() -> None:
    batcher = Batcher(depth=1, budget=64, divides=False)
    batcher.add(1, SendStep(9, 1, True))
    batcher.next()
    batcher.add(2, SendStep(0, 64, False))
    left = 0
    for position in range(10, 10 + 2 * PATIENCE):
        batcher.answered(1, position - 1)
        batcher.add(1, SendStep(position, 1, True))
        sent = [batcher.next(), batcher.next(), batcher.next()]
        left += (Part(2, 0, 64, False),) in sent
        assert (Part(1, position, 1, True),) in sent
    assert left == 1


def test_what_fits_no_micro_batch_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="over the limit of 8"):
        Batcher(depth=1, budget=8, divides=False).add(1, SendStep(0, 9, False))
