"""What is the same for every engine: sequences, slots, positions, sampling, figures.

No I/O and no native code here; the engine is handed in. A step's rows are checked against what
this stage has seen: a repeated row is dropped without harm, a gap is that sequence's error, and
a row of a sequence that is not open (cancelled a moment ago) is dropped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgellm.engine.base import Decoded, Float32, Int32, Sampler, SlotRow, StageConfig, StageEngine
from edgellm.engine.grouping import decode_groups
from edgellm.errors import EdgeError, RemoteProtocolError, StageError
from edgellm.types import SamplerSettings
from edgellm.wire.messages import Result, Row

SamplerFactory = Callable[[SamplerSettings, int], Sampler]


@dataclass(slots=True)
class _Sequence:
    slot: int
    next_position: int = 0
    history: list[int] = field(default_factory=list)
    """Last stage: the prompt and every token sampled so far."""
    sampler: Sampler | None = None
    wants_logits: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one decode call of a step gave: rows for the next stage, or results, or failures."""

    rows: tuple[Row, ...] = ()
    hidden: Float32 | None = None
    results: tuple[Result, ...] = ()
    logits: Float32 | None = None
    """float32 [results whose sequence asked for logits, vocabulary], in order of the results."""
    failures: tuple[tuple[int, EdgeError], ...] = ()


@dataclass(slots=True)
class StageFigures:
    """Counters since load; seconds and numbers, for ``timings`` and the bench."""

    steps: int = 0
    tokens: int = 0
    prefill_s: float = 0.0
    """Inside the engine's compute call, for steps with chunks of a prompt."""
    decode_s: float = 0.0
    """The same for steps of one token a sequence."""
    sample_s: float = 0.0
    busy_s: float = 0.0
    """All of it, from a step's arrival to its answer."""


class StageRunner:
    """Drives one engine; single threaded."""

    def __init__(
        self, engine: StageEngine, config: StageConfig, make_sampler: SamplerFactory
    ) -> None:
        self._engine = engine
        self._config = config
        self._make_sampler = make_sampler
        self._sequences: dict[int, _Sequence] = {}
        self._free = list(range(config.settings.sequences))[::-1]
        self.figures = StageFigures()

    @property
    def engine(self) -> StageEngine:
        return self._engine

    @property
    def open_sequences(self) -> int:
        return len(self._sequences)

    def open(
        self, sequence: int, sampler: SamplerSettings, prompt: Sequence[int], logits: bool
    ) -> None:
        """Reserve a slot. Raises StageError when all are taken or the id is in use."""
        if sequence in self._sequences:
            raise StageError(f"sequence {sequence} is already open.")
        if not self._free:
            raise StageError(
                f"all {self._config.settings.sequences} sequences of this stage are in use.",
                hint="Wait for a request to end, or load the model with more sequences.",
            )
        entry = _Sequence(slot=self._free[-1])
        if self._config.last:
            entry.sampler = self._make_sampler(sampler, self._engine.vocabulary)
            entry.history = list(prompt)
            entry.wants_logits = logits
        self._free.pop()
        self._sequences[sequence] = entry

    def close(self, sequence: int) -> None:
        """Free a sequence's slot and KV; unknown ones are ignored (closing twice is harmless)."""
        entry = self._sequences.pop(sequence, None)
        if entry is not None:
            self._engine.clear(entry.slot)
            self._free.append(entry.slot)
            if entry.sampler is not None:
                entry.sampler.close()

    def step(
        self, rows: Sequence[Row], tokens: Int32 | None, hidden: Float32 | None
    ) -> Iterator[Outcome]:
        """Decode a step; one outcome a decode call, as soon as each is there.

        ``tokens`` int32 [sum of counts] at the first stage, else ``hidden`` float32 [sum, width].
        Raises RemoteProtocolError for two rows of one sequence: one may not follow a failed other.
        """
        if len({row.sequence for row in rows}) != len(rows):
            raise RemoteProtocolError("a step has two rows of one sequence.")
        started = time.perf_counter()
        accepted: list[Row] = []
        slot_rows: list[SlotRow] = []
        spans: list[tuple[int, int]] = []
        failures: list[tuple[int, EdgeError]] = []
        at = 0
        for row in rows:
            begin, at = at, at + row.count
            entry = self._sequences.get(row.sequence)
            if entry is None or row.position + row.count <= entry.next_position:
                continue
            error = self._refusal(row, entry)
            if error is not None:
                failures.append((row.sequence, error))
                continue
            entry.next_position = row.position + row.count
            accepted.append(row)
            slot_rows.append(SlotRow(entry.slot, row.position, row.count, row.output))
            spans.append((begin, at))
        for sequence, _ in failures:
            self.close(sequence)
        if failures:
            yield Outcome(failures=tuple(failures))
        capacity = self._config.settings.chunk
        for group in decode_groups(slot_rows, self._engine.joint, capacity) if accepted else []:
            part = [spans[index] for index in group]
            group_rows = tuple(accepted[index] for index in group)
            native = self._engine.native_seconds
            try:
                decoded = self._engine.decode(
                    [slot_rows[index] for index in group],
                    _take(tokens, part) if tokens is not None else None,
                    _take(hidden, part) if hidden is not None else None,
                )
                outcome = self._outcome(group_rows, decoded)
            except EdgeError as error:
                for row in group_rows:
                    self.close(row.sequence)
                outcome = Outcome(failures=tuple((row.sequence, error) for row in group_rows))
            native = self._engine.native_seconds - native
            if all(row.count == 1 for row in group_rows):
                self.figures.decode_s += native
            else:
                self.figures.prefill_s += native
            self.figures.steps += 1
            self.figures.tokens += sum(row.count for row in group_rows)
            self.figures.busy_s += time.perf_counter() - started
            yield outcome
            started = time.perf_counter()

    def _refusal(self, row: Row, entry: _Sequence) -> EdgeError | None:
        settings = self._config.settings
        if row.position != entry.next_position:
            return StageError(
                f"sequence {row.sequence}: position {row.position} arrived,"
                f" {entry.next_position} was expected."
            )
        if row.count > settings.chunk:
            return StageError(f"a chunk of {row.count} tokens is over the limit {settings.chunk}.")
        if row.position + row.count > settings.context:
            return StageError(
                f"the context of {settings.context} tokens is full.",
                hint="Use a larger --ctx or a shorter conversation.",
            )
        return None

    def _outcome(self, rows: tuple[Row, ...], decoded: Decoded) -> Outcome:
        if decoded.hidden is not None:
            return Outcome(rows=rows, hidden=decoded.hidden)
        logits = decoded.logits
        if logits is None:
            raise StageError("the engine gave neither hidden rows nor logits.")
        started = time.perf_counter()
        results: list[Result] = []
        kept: list[Float32] = []
        failures: list[tuple[int, EdgeError]] = []
        at = 0
        for row in rows:
            last = row.position + row.count - 1
            if not row.output:
                results.append(Result(row.sequence, last, -1))
                continue
            entry = self._sequences[row.sequence]
            output = logits[at]
            at += 1
            try:
                token = self._sample(entry, output, last + 1)
            except EdgeError as error:  # of this row alone: the others of the call are good
                failures.append((row.sequence, error))
                self.close(row.sequence)
                continue
            results.append(Result(row.sequence, last, token))
            if entry.wants_logits:
                kept.append(np.array(output, np.float32))
        self.figures.sample_s += time.perf_counter() - started
        return Outcome(
            results=tuple(results),
            logits=np.stack(kept) if kept else None,
            failures=tuple(failures),
        )

    def _sample(self, entry: _Sequence, logits: Float32, position: int) -> int:
        if entry.sampler is None:
            raise StageError("output was asked for at a stage that is not the last.")
        known = entry.history
        token = entry.sampler.sample(
            logits, position, known if len(known) == position else known[:position]
        )
        if len(known) == position:  # on a replay the token is known already
            known.append(token)
        return token


def _take(source: Any, spans: list[tuple[int, int]]) -> Any:
    """The rows of ``spans``; a view where they are one run, which is the usual case."""
    if all(left[1] == right[0] for left, right in itertools.pairwise(spans)):
        return source[spans[0][0] : spans[-1][1]]
    return np.concatenate([source[begin:end] for begin, end in spans])
