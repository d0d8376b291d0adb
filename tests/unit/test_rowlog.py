"""The log of rows that a stage sent: all of them or none, in the shapes that they first had."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edgellm.errors import RemoteProtocolError
from edgellm.runtime.rowlog import FRAME_BYTES, MAX_LOG_BYTES, Piece, RowLog, sent_again
from edgellm.types import Activations
from edgellm.wire.frames import Frame, FrameDecoder
from edgellm.wire.messages import Hidden, Message, Result, Row, Tokens, encode, kind_of, peek
from edgellm.wire.tensors import decode_rows, encode_rows, rows_nbytes

pytestmark = pytest.mark.pure

WIDTH = 16
EPOCH = 7


def frame_of(message: Message) -> Frame:
    decoder = FrameDecoder({kind_of(Hidden): 1 << 24})
    (frame,) = decoder.feed(b"".join(encode(message)))
    return frame


def add(log: RowLog, frame: Frame) -> None:
    epoch, rows = peek(frame)
    log.add(frame, epoch, [row for row in rows if isinstance(row, Row)])


def values(sequence: int, position: int, count: int) -> NDArray[np.float32]:
    """The rows of a sequence: float32 [count, WIDTH], of very different sizes from row to row."""
    rows = []
    for at in range(position, position + count):
        noise = np.random.default_rng((sequence, at)).standard_normal(WIDTH)
        rows.append(noise * 10.0 ** (at % 9 - 4))
    return np.array(rows, np.float32)


def hidden(
    rows: Sequence[tuple[int, int, int]],
    epoch: int = EPOCH,
    activations: Activations = Activations.FLOAT32,
) -> Frame:
    """A frame with (sequence, position, count) rows of ``values``."""
    data = np.concatenate([values(*row) for row in rows])
    made = tuple(Row(*row, True) for row in rows)
    return frame_of(Hidden(epoch, made, WIDTH, activations, encode_rows(data, activations)))


def shapes(pieces: Sequence[Piece] | None) -> list[tuple[int, int]] | None:
    return None if pieces is None else [(piece.position, piece.count) for piece in pieces]


def filled(*rows: tuple[int, int], sequence: int = 1) -> RowLog:
    log = RowLog()
    log.open(sequence, 0, EPOCH)
    for position, count in rows:
        add(log, hidden([(sequence, position, count)]))
    return log


def test_rows_are_kept_in_the_frames_that_they_were_sent_in() -> None:
    log = filled((0, 8), (8, 5), (13, 1), (14, 1))
    assert shapes(log.before(1, 15)) == [(0, 8), (8, 5), (13, 1), (14, 1)]
    assert shapes(log.before(1, 14)) == [(0, 8), (8, 5), (13, 1)]
    assert shapes(log.before(1, 0)) == []


def test_an_end_within_a_frame_cuts_it_and_nothing_else() -> None:
    log = filled((0, 8), (8, 5))
    assert shapes(log.before(1, 10)) == [(0, 8), (8, 2)]
    assert shapes(log.before(1, 3)) == [(0, 3)]
    assert shapes(log.before(1, 13)) == [(0, 8), (8, 5)]  # the log itself is whole


def test_what_was_not_sent_is_not_there() -> None:
    log = filled((0, 8))
    assert log.before(1, 9) is None
    assert log.before(2, 1) is None
    assert RowLog().before(1, 0) is None


@pytest.mark.parametrize("activations", list(Activations))
def test_rows_are_sent_again_bit_for_bit(activations: Activations) -> None:
    """Also one sequence's out of a frame of several, and the first ones of a chunk."""
    log = RowLog()
    for sequence in (1, 2, 3):
        log.open(sequence, 0, EPOCH)
    add(log, hidden([(1, 0, 3), (2, 0, 5), (3, 0, 1)], activations=activations))
    add(log, hidden([(3, 1, 1), (2, 5, 4)], activations=activations))
    for sequence, end, wanted in (
        (1, 3, [(0, 3)]),
        (2, 9, [(0, 5), (5, 4)]),
        (2, 7, [(0, 5), (5, 2)]),
        (2, 2, [(0, 2)]),
        (3, 2, [(0, 1), (1, 1)]),
    ):
        pieces = log.before(sequence, end)
        assert pieces is not None
        assert shapes(pieces) == wanted
        for piece in pieces:
            again = sent_again(piece, sequence, 99)
            encode(again)  # it passes the protocol's own checks
            assert again.epoch == 99
            assert again.rows == (Row(sequence, piece.position, piece.count, False),)
            original = values(sequence, piece.position, piece.count)
            # each row has an exponent of its own: alone it has the bytes that it had among others
            assert bytes(again.payload) == encode_rows(original, activations)


def test_control_other_rows_are_other_bytes() -> None:
    """What the test above compares differs from row to row."""
    log = filled((0, 4))
    pieces = log.before(1, 2)
    assert pieces is not None
    again = sent_again(pieces[0], 1, 99)
    for other in (values(1, 1, 2), values(2, 0, 2), values(1, 0, 2)[::-1].copy()):
        assert bytes(again.payload) != encode_rows(other, Activations.FLOAT32)


def test_a_whole_frame_is_not_copied() -> None:
    log = RowLog()
    log.open(1, 0, EPOCH)
    frame = hidden([(1, 0, 4)])
    add(log, frame)
    pieces = log.before(1, 4)
    assert pieces is not None
    again = sent_again(pieces[0], 1, 99).payload
    assert isinstance(again, memoryview)
    assert again.obj is frame.payload.obj


@pytest.mark.parametrize(
    ("position", "left"),
    [
        (14, [(0, 8), (8, 5), (13, 1)]),
        (13, [(0, 8), (8, 5)]),
        (10, [(0, 8), (8, 2)]),
        (8, [(0, 8)]),
        (20, [(0, 8), (8, 5), (13, 1)]),
        (0, []),
    ],
)
def test_a_sequence_that_goes_on_forgets_what_is_from_there_on(
    position: int, left: list[tuple[int, int]]
) -> None:
    log = filled((0, 8), (8, 5), (13, 1))
    log.open(1, position, EPOCH + 1)
    end = min(position, 14)
    assert shapes(log.before(1, end)) == left
    assert log.before(1, end + 1) is None
    add(log, hidden([(1, end, 2)], EPOCH + 1))
    assert shapes(log.before(1, end + 2)) == [*left, (end, 2)]


def test_rows_of_a_former_plan_are_not_mixed_in() -> None:
    log = filled((0, 8), (8, 1))
    log.open(1, 8, EPOCH + 1)
    add(log, hidden([(1, 8, 1)]))  # late, of the old epoch
    assert log.before(1, 9) is None
    add(log, hidden([(1, 8, 2)], EPOCH + 1))
    assert shapes(log.before(1, 10)) == [(0, 8), (8, 2)]


def test_rows_that_are_sent_anew_take_the_place_of_those_before() -> None:
    log = filled((0, 8), (8, 1), (9, 1), (10, 1))
    add(log, hidden([(1, 9, 2)]))
    assert shapes(log.before(1, 11)) == [(0, 8), (8, 1), (9, 2)]
    add(log, hidden([(1, 0, 4)]))
    assert shapes(log.before(1, 4)) == [(0, 4)]


def test_a_gap_makes_a_sequence_useless_until_it_begins_anew() -> None:
    log = filled((0, 8), (9, 1))
    assert log.before(1, 5) is None
    assert log.held_bytes == 0
    add(log, hidden([(1, 10, 1)]))
    assert log.before(1, 1) is None
    add(log, hidden([(1, 0, 4)]))
    assert shapes(log.before(1, 4)) == [(0, 4)]


def test_one_that_came_as_pages_has_no_rows_to_send() -> None:
    log = RowLog()
    log.open(1, 20, EPOCH)
    add(log, hidden([(1, 20, 1)]))
    assert log.before(1, 21) is None
    assert log.before(1, 20) is None
    assert log.held_bytes == 0


def test_only_open_sequences_are_kept() -> None:
    log = filled((0, 8))
    add(log, hidden([(2, 0, 8)]))
    assert log.before(2, 8) is None
    log.close(1)
    log.close(1)
    assert log.held_bytes == 0
    assert log.epoch_of(1) is None
    add(log, hidden([(1, 8, 1)]))
    assert log.held_bytes == 0


def test_the_largest_sequence_is_given_up_as_a_whole() -> None:
    one = rows_nbytes(1, WIDTH, Activations.FLOAT32) + FRAME_BYTES
    log = RowLog(12 * one)
    for sequence in (1, 2):
        log.open(sequence, 0, EPOCH)
    for position in range(4):
        add(log, hidden([(1, position, 1)]))
    position = 0
    while log.before(2, position) is not None:
        add(log, hidden([(2, position, 1)]))
        position += 1
    assert 4 < position < 12
    assert shapes(log.before(1, 4)) == [(at, 1) for at in range(4)]
    for at in range(position, 100):
        add(log, hidden([(2, at, 1)]))
    assert log.before(2, 50) is None  # what comes later does not make it whole
    assert log.before(1, 4) is not None


def test_memory_stays_bounded_whatever_is_sent() -> None:
    """Frames that several sequences share are held until the last of them lets go."""
    chance = random.Random(5)
    limit = 20_000
    log = RowLog(limit)
    ends = dict.fromkeys(range(6), 0)
    for sequence in ends:
        log.open(sequence, 0, EPOCH)
    for _ in range(800):
        action = chance.random()
        if action < 0.05:
            sequence = chance.choice(list(ends))
            log.close(sequence)
            log.open(sequence, 0, EPOCH)
            ends[sequence] = 0
        elif action < 0.1:
            sequence = chance.choice(list(ends))
            ends[sequence] = chance.randint(0, ends[sequence])
            log.open(sequence, ends[sequence], EPOCH)
        else:
            rows = []
            for sequence in chance.sample(list(ends), chance.randint(1, 4)):
                count = chance.randint(1, 3)
                rows.append((sequence, ends[sequence], count))
                ends[sequence] += count
            add(log, hidden(rows))
        pieces = [p for s in ends for p in log._sequences[s].pieces]
        frames = {id(piece.kept): piece.kept for piece in pieces}
        assert log.held_bytes == sum(len(k.frame.raw) + FRAME_BYTES for k in frames.values())
        assert log.held_bytes <= limit
        for sequence, end in ends.items():
            kept = log.before(sequence, end)
            if kept is not None:
                assert sum(piece.count for piece in kept) == end
    for sequence in ends:
        log.close(sequence)
    assert log.held_bytes == 0
    assert MAX_LOG_BYTES == 64 << 20


@pytest.mark.parametrize("moved", [True, False])
def test_a_sequence_begins_with_the_rows_of_another_one(moved: bool) -> None:
    log = filled((0, 8), (8, 8), (16, 1))
    log.keep(1)
    log.share(2, 1, 12, moved=moved)
    log.open(2, 12, EPOCH)
    add(log, hidden([(2, 12, 3)]))
    pieces = log.before(2, 15)
    assert shapes(pieces) == [(0, 8), (8, 4), (12, 3)]
    assert pieces is not None
    again = sent_again(pieces[1], 2, 99)
    rows = decode_rows(again.payload, 4, WIDTH, again.activations)
    assert np.array_equal(rows, values(1, 8, 4))
    assert again.rows == (Row(2, 8, 4, False),)
    assert shapes(log.before(1, 17)) == (None if moved else [(0, 8), (8, 8), (16, 1)])
    log.close(1)
    assert log.before(2, 15) is not None
    log.close(2)
    assert log.held_bytes == 0


def test_rows_that_are_not_all_kept_are_no_beginning() -> None:
    log = filled((0, 8), (8, 8))
    for source, position in ((1, 17), (3, 8)):
        log.share(2, source, position, moved=False)
        log.open(2, position, EPOCH)
        add(log, hidden([(2, position, 3)]))
        assert log.before(2, position + 3) is None
    assert log.before(1, 16) is not None


def test_rows_of_what_has_ended_are_given_up_first() -> None:
    log = filled((0, 8), (8, 8))
    limit = log.held_bytes
    log = RowLog(limit)
    for sequence in (1, 2):
        log.open(sequence, 0, EPOCH)
    add(log, hidden([(1, 0, 2)]))
    log.keep(1)
    add(log, hidden([(2, 0, 8)]))
    add(log, hidden([(2, 8, 8)]))
    assert log.before(1, 2) is None
    assert log.before(2, 16) is not None


def test_a_frame_that_is_no_rows_is_not_sent_again() -> None:
    log = RowLog()
    log.open(1, 0, EPOCH)
    log.add(frame_of(Tokens(EPOCH, (Result(1, 0, 5),))), EPOCH, [Row(1, 0, 1, True)])
    pieces = log.before(1, 1)
    assert pieces is not None
    with pytest.raises(RemoteProtocolError):
        sent_again(pieces[0], 1, EPOCH)


def test_values_have_rows_of_different_exponents() -> None:
    """What is cut from a frame of float16 rows takes the right exponents along."""
    rows = values(1, 0, 9)
    kept = decode_rows(encode_rows(rows, Activations.FLOAT16), 9, WIDTH, Activations.FLOAT16)
    assert np.abs(kept).max(axis=1).max() / np.abs(kept).max(axis=1).min() > 1e5
