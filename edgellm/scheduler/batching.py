"""Which steps go out together, and when: the micro-batches of many requests. Pure.

Every request says by itself what it wants computed next (``generation.Generation``); here these
steps become rows of micro-batches. Requests join and leave at every one of them. With ``depth``
micro-batches of equal size on their way, one for each stage, no stage waits for another: the rows
that come back go out again at once, while the other stages compute the others. A request that is
alone goes through unchanged: its steps are one micro-batch each, as soon as they are there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from edgellm.errors import LocalProtocolError
from edgellm.scheduler.generation import SMALLEST_CHUNK, TOKENS_A_CHUNK, SendStep

PREFILL_BESIDE = 32
"""Tokens of prompts in a micro-batch while others decode: more would show as a stumble in every
other answer, fewer would compute the prompt much slower."""
PATIENCE = 8
"""Micro-batches that may leave without a step that is ready; then it goes before all others."""
_CHUNK_LOAD = TOKENS_A_CHUNK
"""What a micro-batch counts against those that may be in flight; one of replayed tokens is 1."""


class Part(NamedTuple):
    """A row of a micro-batch: tokens [position, position + count) of a sequence."""

    sequence: int
    position: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a row for
    output: bool
    """Whether a token is wanted after the last of them."""


@dataclass(slots=True)
class _Flight:
    """A micro-batch that is on its way."""

    rows: int
    """Of it that are not answered."""
    decodes: bool
    """Whether tokens are waited for that others follow."""
    load: int


@dataclass(slots=True)
class _Entry:
    """What a request waits for."""

    sequence: int
    priority: int
    turn: int
    """Of the moment when its next step became the next."""
    steps: deque[SendStep] = field(default_factory=deque)
    """Not sent, in order."""
    passed: int = 0
    """Micro-batches that left without it since then."""
    decodes: bool = False
    """Whether it makes a token at a time."""
    flying: deque[tuple[int, _Flight]] = field(default_factory=deque)
    """(last position, where it is) of what was sent and is not answered."""

    @property
    def single(self) -> bool:
        """Whether its next step is a token after which the next is made."""
        step = self.steps[0]
        return step.count == 1 and step.output

    @property
    def order(self) -> tuple[bool, int, int]:
        """The smallest goes first."""
        patient = self.passed < PATIENCE
        return patient, -self.priority if patient else 0, self.turn


class Batcher:
    """See the module. ``add`` what is to be computed, send what ``next`` says until it says
    nothing, and tell what is ``answered``.

    ``depth`` is the number of micro-batches that keep every stage busy: that of the stages.
    ``budget`` is the most tokens in one. Where ``divides``, a chunk may go in parts: its bits do
    not matter.
    """

    def __init__(self, *, depth: int, budget: int, divides: bool) -> None:
        self._depth = max(1, depth)
        self._budget = budget
        self._divides = divides
        self._entries: dict[int, _Entry] = {}
        self._turn = 0
        self._decoding_flights = 0
        self._chunk_load = 0

    @property
    def waiting(self) -> int:
        """Steps that are not sent."""
        return sum(len(entry.steps) for entry in self._entries.values())

    @property
    def in_flight(self) -> int:
        """Rows that are sent and not answered."""
        return sum(len(entry.flying) for entry in self._entries.values())

    def add(self, sequence: int, step: SendStep, priority: int = 0) -> None:
        """A step of a request, behind its earlier ones. Raises LocalProtocolError for one that no
        micro-batch can hold."""
        if step.count > self._budget:
            raise LocalProtocolError(
                f"a chunk of {step.count} tokens is over the limit of {self._budget}."
            )
        entry = self._entries.get(sequence)
        if entry is None:
            entry = self._entries[sequence] = _Entry(sequence, priority, self._next_turn())
        elif not entry.steps:
            entry.turn, entry.passed = self._next_turn(), 0
        entry.steps.append(step)
        entry.decodes = step.count == 1 and step.output

    def answered(self, sequence: int, position: int) -> None:
        """The row of a sequence that ended at ``position`` was computed by all stages. What was not
        expected is ignored."""
        entry = self._entries.get(sequence)
        if entry is None or not entry.flying or entry.flying[0][0] != position:
            return
        self._land(entry.flying.popleft()[1])
        if not entry.steps and not entry.flying:
            del self._entries[sequence]

    def drop(self, sequence: int) -> None:
        """A request has ended, or goes elsewhere: nothing more of it is sent or waited for."""
        entry = self._entries.pop(sequence, None)
        if entry is not None:
            for _, flight in entry.flying:
                self._land(flight)

    def next(self) -> tuple[Part, ...]:
        """The rows of the micro-batch that is to leave now; empty while none is."""
        ready = [entry for entry in self._entries.values() if entry.steps]
        if not ready:
            return ()
        if len(self._entries) == 1:
            entry = ready[0]  # its own window says how much may be in flight
            return self._leave([(entry, entry.steps[0].count)], ready)
        decoding = sum(entry.decodes for entry in self._entries.values())
        singles = sorted((entry for entry in ready if entry.single), key=lambda entry: entry.order)
        chunks = sorted(
            (entry for entry in ready if not entry.single), key=lambda entry: entry.order
        )
        overdue = bool(chunks) and chunks[0].passed >= PATIENCE
        chunk_first = overdue and self._takes_chunks(decoding, overdue)
        taken: list[tuple[_Entry, int]] = []
        if singles and not chunk_first and self._decoding_flights < self._depth:
            share = max(1, -(-decoding // self._depth))
            taken = [(entry, 1) for entry in singles[: min(share, self._budget)]]
        if chunks and (taken or self._takes_chunks(decoding, overdue)):
            taken += self._chunks(chunks, len(taken), bool(decoding))
        return self._leave(taken, ready) if taken else ()

    def _takes_chunks(self, decoding: int, overdue: bool) -> bool:
        """Whether a micro-batch of chunks alone may leave: one more than stages where nobody else
        would have to wait for it."""
        if decoding:
            most = max(self._depth - self._decoding_flights, int(overdue))
        else:
            most = self._depth + 1
        return self._chunk_load < most * _CHUNK_LOAD

    def _chunks(
        self, chunks: list[_Entry], beside: int, decoding: bool
    ) -> list[tuple[_Entry, int]]:
        """Chunks, or parts of them, for a micro-batch that has ``beside`` tokens already: together
        no more than a good chunk, so that the prompts of several are computed in turn."""
        room = self._budget - beside
        good = min(room, PREFILL_BESIDE if decoding else SMALLEST_CHUNK)
        taken: list[tuple[_Entry, int]] = []
        total = 0
        for entry in chunks if room else ():
            count = entry.steps[0].count
            if self._divides and decoding:
                count = min(count, good - total)
            if total + count <= room:
                taken.append((entry, count))
                total += count
            if total >= good:
                break
        return taken

    def _leave(self, taken: list[tuple[_Entry, int]], ready: list[_Entry]) -> tuple[Part, ...]:
        """Take the first ``count`` tokens of the next step of each."""
        parts = []
        flight = _Flight(len(taken), False, 1)
        for entry in ready:
            entry.passed += 1
        for entry, count in taken:
            step = entry.steps.popleft()
            output = step.output and count == step.count
            if count < step.count:
                rest = SendStep(step.position + count, step.count - count, step.output)
                entry.steps.appendleft(rest)
            parts.append(Part(entry.sequence, step.position, count, output))
            if count > 1 or output:
                flight.load = _CHUNK_LOAD
                flight.decodes |= count == 1
            entry.flying.append((step.position + count - 1, flight))
            entry.passed = 0
            entry.turn = self._next_turn()
        if flight.decodes:
            self._decoding_flights += 1
        else:
            self._chunk_load += flight.load
        return tuple(parts)

    def _land(self, flight: _Flight) -> None:
        flight.rows -= 1
        if flight.rows:
            return
        if flight.decodes:
            self._decoding_flights -= 1
        else:
            self._chunk_load -= flight.load

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn
