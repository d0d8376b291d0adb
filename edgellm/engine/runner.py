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
from edgellm.engine.pages import Image, Page, check_page
from edgellm.errors import EdgeError, RemoteProtocolError, StageError
from edgellm.types import SamplerSettings
from edgellm.wire.frames import Buffer
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
    opened: bool = False
    """By ``OpenSequence`` under the plan that is; before, it takes no rows."""
    incoming: Image | None = None
    """Pages that are on their way here."""
    taken: int = 0
    """How many of them came."""
    keep: int = 0
    """Opened while they came: the position from which on they are to be forgotten."""


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
    restored_tokens: int = 0
    """Positions that came as KV pages; they are not in ``tokens``."""
    pages_bytes: int = 0
    """Of KV pages, given and taken."""


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
        self,
        sequence: int,
        sampler: SamplerSettings,
        history: Sequence[int],
        logits: bool,
        position: int = 0,
    ) -> None:
        """Let a sequence take rows; ``history`` is all its tokens so far (last stage).

        A new one gets a slot, and is expected from position 0 on. One that is held already, over a
        ``rebind`` or as pages, keeps its tokens before ``position`` and forgets the others; while
        its pages are still on their way that is done when they are there.

        Raises StageError when all slots are taken, when the sequence is open already, or when what
        it holds cannot be forgotten (then it is closed).
        """
        entry = self._sequences.get(sequence)
        if entry is not None and entry.opened:
            raise StageError(f"sequence {sequence} is already open.")
        made = None
        if self._config.last:
            made = self._make_sampler(sampler, self._engine.vocabulary)
        try:
            if entry is None:
                entry = self._reserve(sequence)
            elif entry.incoming is not None:
                entry.keep = position
            else:
                self._truncate(entry, position)
        except EdgeError:
            if made is not None:
                made.close()
            self.close(sequence)
            raise
        if entry.sampler is not None:
            entry.sampler.close()
        entry.sampler = made
        entry.history = list(history) if self._config.last else []
        entry.wants_logits = logits
        entry.opened = True

    def _reserve(self, sequence: int) -> _Sequence:
        if not self._free:
            raise StageError(
                f"all {self._config.settings.sequences} sequences of this stage are in use.",
                hint="Wait for a request to end, or load the model with more sequences.",
            )
        entry = self._sequences[sequence] = _Sequence(slot=self._free.pop())
        return entry

    def _truncate(self, entry: _Sequence, position: int) -> None:
        if position >= entry.next_position:
            return
        if position:
            self._engine.truncate(entry.slot, position)
        else:
            self._engine.clear(entry.slot)
        entry.next_position = position

    def rebind(self) -> None:
        """Another plan holds from now on: sequences are kept, and wait to be opened under it.

        Those whose pages were on their way are forgotten: the rest is for the old plan.
        """
        for sequence, entry in list(self._sequences.items()):
            if entry.incoming is not None:
                self.close(sequence)
            entry.opened = False

    def export(self, sequence: int) -> Iterator[tuple[Page, bytes]]:
        """The pages of a sequence, one by one, as they are asked for.

        Raises StageError when it is not held, or when the engine cannot give it away.
        """
        entry = self._sequences.get(sequence)
        if entry is None or not entry.next_position:
            raise StageError(f"nothing of sequence {sequence} is held here.")
        image = self._engine.export(entry.slot, entry.next_position)
        for page in image.pages:
            self.figures.pages_bytes += page.nbytes
            yield page, image.read(page)

    def expect(self, sequence: int, position: int) -> None:
        """Make room for the pages of a sequence of ``position`` tokens.

        It may be open already, if it holds nothing yet. Raises StageError when it cannot be taken
        here; a sequence that was not held before is not held then.
        """
        if not 0 < position <= self._config.settings.context:
            raise StageError(
                f"{position} tokens of sequence {sequence} cannot be taken into a context of"
                f" {self._config.settings.context}."
            )
        entry = self._sequences.get(sequence)
        if entry is not None and (entry.next_position or entry.incoming is not None):
            raise StageError(f"sequence {sequence} is held here already.")
        if entry is None:
            entry = self._reserve(sequence)
        try:
            entry.incoming = self._engine.blank(entry.slot, position)
        except EdgeError:
            self.close(sequence)
            raise
        entry.taken = 0
        entry.keep = position

    def take_page(
        self,
        sequence: int,
        payload: Buffer,
        *,
        index: int,
        pages: int,
        kind: str,
        position: int,
        count: int,
    ) -> int:
        """Put a page in its place. Returns the tokens that are held, once it was the last one,
        before that 0; 0 as well for a sequence that expects none (closed a moment ago).

        Raises StageError for a page that is not the next one, or not of its place or size: all of
        that before anything of it reaches the engine, and the sequence is to be closed.
        """
        entry = self._sequences.get(sequence)
        if entry is None or entry.incoming is None:
            return 0
        image = entry.incoming
        if index != entry.taken:
            raise StageError(f"KV page {index} came, page {entry.taken} was expected.")
        page = image.pages[index]
        check_page(page, kind=kind, position=position, count=count, pages=pages)
        image.write(page, payload)
        entry.taken += 1
        if entry.taken < len(image.pages):
            return 0
        entry.incoming = None
        image.check()
        self._engine.restore(entry.slot, image)
        entry.next_position = image.tokens
        self.figures.restored_tokens += image.tokens
        self.figures.pages_bytes += sum(page.nbytes for page in image.pages)
        self._truncate(entry, entry.keep)
        return entry.next_position

    def pages_bytes_of(self, sequence: int) -> tuple[int, int]:
        """(bytes, pages) that are expected of a sequence; zeros when none are."""
        entry = self._sequences.get(sequence)
        if entry is None or entry.incoming is None:
            return 0, 0
        pages = entry.incoming.pages
        return sum(page.nbytes for page in pages), len(pages)

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
        if entry.incoming is not None:
            return StageError(f"sequence {row.sequence}: rows arrived before all its KV pages.")
        if not entry.opened:
            return StageError(f"sequence {row.sequence} is not open under this plan.")
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
