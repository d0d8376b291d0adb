"""Which piece to ask of which source: a transfer as a pure state machine. No I/O and no clock.

Sources join with the digests of the tensors that they hold, and leave. ``poll`` says what to ask
of whom now; the caller sends that, checks what comes back, and tells. A source that sends a wrong
piece is dropped for good. One that keeps a piece waiting for too long is suspect: the piece goes
elsewhere, and it is asked for nothing more until it has answered; silent for much longer, it is
given up. At the end pieces that wait at a slow source are asked of an idle one as well.

A transfer always ends: ``done``, or ``stuck`` with the reason in words; a source that joins later
gets a stuck one going again. All times are seconds of any one clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

PER_SOURCE = 3
"""Requests outstanding at one source."""
IN_ALL = 6
"""Requests outstanding at all sources: with pieces of 512 KiB a crash loses at most 3 MiB."""
SILENCE = 4
"""Times the time-out without any answer, after which a source is given up."""
_SLOW = 2.0
"""Times what an idle source takes for a piece; whoever takes longer gets help at the end."""
_WEIGHT = 0.3
"""Of the newest figure in a source's mean."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """``length`` bytes from byte ``offset`` on of the tensor ``digest``; its ``index``-th piece."""

    digest: str
    index: int
    offset: int
    length: int


class Ask(NamedTuple):
    """Ask ``source`` for ``piece`` now."""

    source: str
    piece: Piece


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is."""

    done_bytes: int
    total_bytes: int
    by_source: dict[str, int]
    """Bytes that came first from each source, also of those that left."""
    wasted_bytes: int
    """Bytes that came once more, or were wrong."""


@dataclass(slots=True)
class _Source:
    digests: frozenset[str]
    waiting_since: float = 0.0
    """When it last answered, or was asked with nothing outstanding."""
    asked: dict[Piece, float] = field(default_factory=dict)
    """When; requests that count."""
    late: set[Piece] = field(default_factory=set)
    """Requests past their time-out: the piece is sought elsewhere, but may still come."""
    refused: set[str] = field(default_factory=set)
    piece_s: float = 0.0
    """Mean time of a piece; 0: not known."""

    @property
    def suspect(self) -> bool:
        return bool(self.late)

    def holds(self, piece: Piece) -> bool:
        return piece.digest in self.digests and piece.digest not in self.refused


class Transfer:
    """The pieces that are missing, and where they come from."""

    def __init__(
        self,
        pieces: Iterable[Piece],
        *,
        timeout_s: float,
        per_source: int = PER_SOURCE,
        in_all: int = IN_ALL,
    ) -> None:
        self._pending: dict[str, dict[Piece, None]] = {}
        for piece in pieces:
            self._pending.setdefault(piece.digest, {})[piece] = None
        self._needed = {piece for tensor in self._pending.values() for piece in tensor}
        self._total = sum(piece.length for piece in self._needed)
        self._timeout_s = timeout_s
        self._per_source = per_source
        self._in_all = in_all
        self._sources: dict[str, _Source] = {}
        self._liars: set[str] = set()
        self._given_up: dict[str, str] = {}
        self._bytes: dict[str, int] = {}
        self._done_bytes = 0
        self._wasted = 0
        self._order: list[str] | None = None

    # --- events -----------------------------------------------------------------------

    def join(self, source: str, digests: Collection[str]) -> None:
        """A source can be asked for these tensors; told again, they replace those before.

        A source that lied stays out.
        """
        if source in self._liars:
            return
        self._given_up.pop(source, None)
        known = self._sources.get(source)
        if known is None:
            self._sources[source] = _Source(frozenset(digests))
        else:
            known.digests = frozenset(digests)
            known.refused.clear()
        self._order = None

    def leave(self, source: str) -> None:
        """A source is gone; what it was asked for is sought elsewhere."""
        gone = self._sources.pop(source, None)
        if gone is not None:
            self._order = None
            for piece in gone.asked:
                self._seek(piece)

    def arrived(self, source: str, piece: Piece, good: bool, now: float) -> None:
        """``piece`` came from ``source``; ``good``: it was checked, and is kept."""
        known = self._sources.get(source)
        if not good:
            self._wasted += piece.length
            self._liars.add(source)
            self._drop(source, "sent wrong bytes")
            return
        if known is not None:
            self._heard(known, piece, now)
        if piece not in self._needed:
            self._wasted += piece.length
            return
        self._needed.discard(piece)
        self._unseek(piece)
        self._done_bytes += piece.length
        self._bytes[source] = self._bytes.get(source, 0) + piece.length

    def refused(self, source: str, piece: Piece, now: float) -> None:
        """``source`` does not hold this tensor, or does not any more."""
        known = self._sources.get(source)
        if known is None:
            return
        was_asked = piece in known.asked
        known.refused.add(piece.digest)
        self._order = None
        known.asked.pop(piece, None)
        known.late.discard(piece)
        known.waiting_since = now
        if was_asked:
            self._seek(piece)

    # --- what to do -------------------------------------------------------------------

    def poll(self, now: float) -> tuple[Ask, ...]:
        """What to ask now. Call it after every event, and when ``wake_at`` says."""
        self._expire(now)
        asks = []
        while self._outstanding() < self._in_all:
            ask = self._next(now)
            if ask is None:
                break
            source = self._sources[ask.source]
            if not source.asked:
                source.waiting_since = now
            source.asked[ask.piece] = now
            self._unseek(ask.piece)
            asks.append(ask)
        return tuple(asks)

    def wake_at(self) -> float | None:
        """When ``poll`` may have something new to say by itself; None: not before an event."""
        times = []
        for source in self._sources.values():
            times += [at + self._timeout_s for at in source.asked.values()]
            if source.late:
                times.append(source.waiting_since + SILENCE * self._timeout_s)
        help_at = self._help_at()
        if help_at is not None:
            times.append(help_at)
        return min(times, default=None)

    @property
    def done(self) -> bool:
        """Whether every piece is there."""
        return not self._needed

    @property
    def stuck(self) -> str:
        """Why nothing can go on, in words; empty while something can."""
        if self.done or any(source.asked or source.late for source in self._sources.values()):
            return ""
        lacking = [p for p in self._needed if not any(s.holds(p) for s in self._sources.values())]
        if len(lacking) < len(self._needed):
            return ""
        tensors = len({piece.digest for piece in lacking})
        size = sum(piece.length for piece in lacking) / (1 << 20)
        reasons = [f"{name} {reason}" for name, reason in sorted(self._given_up.items())]
        what = (
            f"{tensors} tensors ({size:.1f} MiB)" if tensors > 1 else f"a tensor ({size:.1f} MiB)"
        )
        text = f"no device that can be reached has {what} of what is missing"
        return "; ".join([text, *reasons])

    # --- figures ----------------------------------------------------------------------

    @property
    def needed(self) -> frozenset[str]:
        """The tensors of which something is missing."""
        return frozenset(piece.digest for piece in self._needed)

    @property
    def liars(self) -> frozenset[str]:
        """Sources that sent a wrong piece."""
        return frozenset(self._liars)

    @property
    def suspects(self) -> frozenset[str]:
        """Sources that keep a piece waiting."""
        return frozenset(name for name, source in self._sources.items() if source.suspect)

    @property
    def progress(self) -> Progress:
        return Progress(self._done_bytes, self._total, dict(self._bytes), self._wasted)

    # --- sources ----------------------------------------------------------------------

    def _heard(self, source: _Source, piece: Piece, now: float) -> None:
        asked_at = source.asked.pop(piece, None)
        source.waiting_since = now
        if asked_at is not None:
            took = max(now - asked_at, 1e-6)
            known = source.piece_s
            source.piece_s = took if not known else known + _WEIGHT * (took - known)
        # It answers after all. Whatever else it kept waiting for too long is sought elsewhere
        # already; should it come, it is welcome.
        source.late.discard(piece)

    def _drop(self, name: str, reason: str) -> None:
        self._given_up[name] = reason
        self.leave(name)

    def _expire(self, now: float) -> None:
        for name, source in list(self._sources.items()):
            for piece in [p for p, at in source.asked.items() if at + self._timeout_s <= now]:
                del source.asked[piece]
                source.late.add(piece)
                self._seek(piece)
            if source.late and source.waiting_since + SILENCE * self._timeout_s <= now:
                self._drop(name, f"gave no answer for {now - source.waiting_since:.0f} s")

    def _outstanding(self) -> int:
        return sum(len(source.asked) for source in self._sources.values())

    # --- pieces -----------------------------------------------------------------------

    def _seek(self, piece: Piece) -> None:
        """Look for a piece (again), unless another source is being asked for it."""
        asked = any(piece in source.asked for source in self._sources.values())
        if piece in self._needed and not asked:
            if piece.digest not in self._pending:
                self._order = None
            self._pending.setdefault(piece.digest, {})[piece] = None

    def _unseek(self, piece: Piece) -> None:
        tensor = self._pending.get(piece.digest)
        if tensor is not None:
            tensor.pop(piece, None)
            if not tensor:
                del self._pending[piece.digest]

    def _next(self, now: float) -> Ask | None:
        """The best question: to the source with the fewest outstanding, the fastest of those."""
        free = [
            (len(source.asked), source.piece_s, name)
            for name, source in self._sources.items()
            if not source.late and len(source.asked) < self._per_source
        ]
        for _, _, name in sorted(free):
            piece = self._pick(self._sources[name])
            if piece is not None:
                return Ask(name, piece)
        return self._help(now)

    def _pick(self, source: _Source) -> Piece | None:
        """A piece of the tensor that the fewest sources have: the others can help with the rest."""
        if self._order is None:
            self._order = sorted(self._pending, key=self._holders)
        for digest in self._order:
            tensor = self._pending.get(digest)
            if tensor:
                piece = next(iter(tensor))
                if source.holds(piece):
                    return piece
        return None

    def _holders(self, digest: str) -> int:
        piece = next(iter(self._pending[digest]))
        return sum(source.holds(piece) for source in self._sources.values())

    # --- the end game -----------------------------------------------------------------

    def _help(self, now: float) -> Ask | None:
        """What an idle source is asked as well, because another one is slow with it."""
        return min((ask for due, ask in self._helpers() if due <= now), default=None)

    def _help_at(self) -> float | None:
        if self._outstanding() >= self._in_all:
            return None
        return min((due for due, _ in self._helpers()), default=None)

    def _helpers(self) -> list[tuple[float, Ask]]:
        """``(when it is due, question)`` for every idle source whose speed is known."""
        found = []
        for name, source in self._sources.items():
            if source.late or source.asked or not source.piece_s:
                continue
            for other in self._sources.values():
                for piece, asked_at in other.asked.items():
                    if piece not in self._needed:
                        continue
                    alone = sum(piece in s.asked for s in self._sources.values()) == 1
                    if alone and source.holds(piece):
                        found.append((asked_at + _SLOW * source.piece_s, Ask(name, piece)))
        return found
