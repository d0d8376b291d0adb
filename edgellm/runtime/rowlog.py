"""The hidden rows that a stage has sent on, kept so that a new next stage can have them again.

Pure: no input or output, no clock. It keeps references to the frames as they went out and reads
nothing of them; they are decoded only when rows are wanted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from edgellm.errors import RemoteProtocolError
from edgellm.types import Activations
from edgellm.wire.frames import Buffer, Frame
from edgellm.wire.messages import Hidden, Row, decode
from edgellm.wire.tensors import rows_nbytes

MAX_LOG_BYTES = 64 << 20
"""Of one stage; thousands of tokens of a prompt and its answer."""
FRAME_BYTES = 512
"""What the objects around a frame take, beside its bytes: a row of a narrow model is smaller."""
_EXPONENT_BYTES = 2


@dataclass(slots=True)
class _Kept:
    """A frame, and how many sequences' pieces still lie in it."""

    frame: Frame
    pieces: int = 0

    @property
    def size(self) -> int:
        return len(self.frame.raw) + FRAME_BYTES


@dataclass(slots=True)
class Piece:
    """Consecutive rows of one sequence, as they went out in one frame."""

    position: int
    count: int
    begin: int
    """Which row of the frame is the first of them."""
    kept: _Kept

    @property
    def end(self) -> int:
        return self.position + self.count


@dataclass(slots=True)
class _Sequence:
    epoch: int
    """Of its latest ``OpenSequence``; rows of another one are not its own."""
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    """Bytes of the frames that its pieces lie in."""
    complete: bool = True
    """Whether it has all rows from position 0."""
    ended: bool = False
    """It only waits for another one that begins with its rows."""

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.pieces[-1].end if self.pieces else 0


class RowLog:
    """See the module. Holds at most ``limit`` bytes: when there is more, the largest sequence's
    rows are given up as a whole, because a part of them is of no use; first those that ended."""

    def __init__(self, limit: int = MAX_LOG_BYTES) -> None:
        self._limit = limit
        self._sequences: dict[int, _Sequence] = {}
        self._held = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the frames that are kept now."""
        return self._held

    def open(self, sequence: int, position: int, epoch: int) -> None:
        """A sequence begins, or goes on from ``position`` in a new epoch: what it had from there on
        is forgotten."""
        log = self._sequences.setdefault(sequence, _Sequence(epoch))
        log.epoch = epoch
        self._truncate(log, position)

    def close(self, sequence: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        log = self._sequences.pop(sequence, None)
        if log is not None:
            self._truncate(log, 0)

    def keep(self, sequence: int) -> None:
        """A sequence has ended; its rows may become the first ones of another. Unknown ones are
        ignored."""
        if log := self._sequences.get(sequence):
            log.ended = True

    def share(self, sequence: int, source: int, position: int, *, moved: bool) -> None:
        """A new sequence begins with the rows of another one before ``position``; ``moved``: the
        other one is no more."""
        log = self._sequences.get(source)
        self.close(sequence)
        if log is None:
            return
        made = self._sequences[sequence] = _Sequence(log.epoch)
        for piece in _until(position, log.pieces):
            self._append(made, piece)
        made.complete = log.complete and made.end == position
        if not made.complete:
            self._give_up(made)
        if moved:
            self.close(source)

    def epoch_of(self, sequence: int) -> int | None:
        """The epoch that a sequence was last opened in; None where it is not open."""
        log = self._sequences.get(sequence)
        return log.epoch if log is not None else None

    def add(self, frame: Frame, epoch: int, rows: Sequence[Row]) -> None:
        """Keep the rows of a ``Hidden`` frame that went out; ``messages.peek`` gave epoch and rows.

        Rows that were sent before take the place of the former ones and of all that followed
        them.
        """
        kept = _Kept(frame)
        begin = 0
        for row in rows:
            log = self._sequences.get(row.sequence)
            if log is not None and log.epoch == epoch:
                self._keep(log, Piece(row.position, row.count, begin, kept))
            begin += row.count
        while self._held > self._limit:
            self._give_up(
                max(self._sequences.values(), key=lambda log: (log.size > 0, log.ended, log.size))
            )

    def _keep(self, log: _Sequence, piece: Piece) -> None:
        if piece.position < log.end or not piece.position:
            self._truncate(log, piece.position)
        if not log.complete or piece.position > log.end:
            self._give_up(log)
            return
        self._append(log, piece)

    def _append(self, log: _Sequence, piece: Piece) -> None:
        log.pieces.append(piece)
        log.size += piece.kept.size
        if not piece.kept.pieces:
            self._held += piece.kept.size
        piece.kept.pieces += 1

    def _truncate(self, log: _Sequence, position: int) -> None:
        while log.pieces and log.pieces[-1].position >= position:
            self._release(log, log.pieces.pop())
        if log.pieces and log.end > position:
            log.pieces[-1].count = position - log.pieces[-1].position
        if not position:
            log.complete = True

    def _give_up(self, log: _Sequence) -> None:
        self._truncate(log, 0)
        log.complete = False

    def _release(self, log: _Sequence, piece: Piece) -> None:
        log.size -= piece.kept.size
        piece.kept.pieces -= 1
        if not piece.kept.pieces:
            self._held -= piece.kept.size

    def before(self, sequence: int, end: int) -> tuple[Piece, ...] | None:
        """The rows of positions 0 to ``end`` (not included) in the pieces that they were sent in;
        None where not all of them are kept. A piece that ``end`` divides is cut there."""
        log = self._sequences.get(sequence)
        if log is None or not log.complete or log.end < end:
            return None
        return tuple(_until(end, log.pieces))


def _until(end: int, pieces: list[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        if piece.position >= end:
            return
        count = min(piece.count, end - piece.position)
        yield Piece(piece.position, count, piece.begin, piece.kept)


def sent_again(piece: Piece, sequence: int, epoch: int) -> Hidden:
    """The rows of a piece as a message of ``epoch``: the same rows in a message of the same shape,
    because how rows are grouped decides the bits of what is computed from them. No token is wanted
    of them: it is known.

    Raises RemoteProtocolError where the frame that they were sent in is broken.
    """
    sent = decode(piece.kept.frame)
    if not isinstance(sent, Hidden):
        raise RemoteProtocolError("only hidden rows can be sent again.")
    total = sum(row.count for row in sent.rows)
    payload = sent.payload
    if piece.count < total:
        payload = _rows_of(sent, total, piece.begin, piece.begin + piece.count)
    row = Row(sequence, piece.position, piece.count, False)
    return Hidden(epoch, (row,), sent.width, sent.activations, payload)


def _rows_of(sent: Hidden, total: int, begin: int, end: int) -> Buffer:
    """Rows [begin, end) of a payload of ``total`` rows, bit for bit: exponents lie before values
    (``wire.tensors``)."""
    view = memoryview(sent.payload)
    head = _EXPONENT_BYTES if sent.activations is Activations.FLOAT16 else 0
    body = rows_nbytes(1, sent.width, sent.activations) - head
    values = view[total * head :]
    return b"".join((view[begin * head : end * head], values[begin * body : end * body]))
