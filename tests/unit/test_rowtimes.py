"""What a node counts of its stage and of the link behind it, by times that are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from edgellm.runtime.links import LinkMeter
from edgellm.runtime.rowtimes import BULK_BYTES, BULK_EVERY_S, EVERY_S, RowTimes, Turns
from edgellm.runtime.session import Session
from edgellm.wire.messages import Result, Row


def row(sequence: int, position: int, count: int = 1) -> Row:
    return Row(sequence, position, count, True)


def counted(turns: Turns, what: str) -> tuple[float, int, int]:
    told = turns.figures()
    seconds, steps, tokens = (told[f"turn_{what}_{name}"] for name in ("s", "steps", "tokens"))
    return seconds, int(steps), int(tokens)


def test_a_step_counts_from_its_arrival_or_from_the_end_of_the_one_before() -> None:
    turns = Turns()
    turns.taken([row(1, 0, 8)], 0.0)
    turns.taken([row(1, 8, 8)], 0.1)  # waits for the first
    turns.answered([row(1, 0, 8)], 1.0)
    turns.answered([row(1, 8, 8)], 1.5)
    turns.taken([row(1, 16)], 3.0)
    turns.answered([Result(1, 16, 42)], 3.25)  # the last stage answers with results
    assert counted(turns, "prefill") == (1.5, 2, 16)
    assert counted(turns, "decode") == (0.25, 1, 1)


def test_steps_of_several_sequences_and_answers_in_several_frames() -> None:
    turns = Turns()
    turns.taken([row(1, 5), row(2, 9), row(3, 0, 4)], 0.0)
    turns.answered([row(1, 5), row(2, 9)], 0.5)
    assert counted(turns, "prefill") == (0.0, 0, 0)
    turns.answered([row(3, 0, 4)], 0.75)
    assert counted(turns, "prefill") == (0.75, 1, 6)
    turns.taken([row(1, 6), row(2, 10)], 1.0)
    turns.answered([row(1, 6), row(2, 10)], 1.125)
    assert counted(turns, "decode") == (0.125, 1, 2)


def test_what_is_stale_is_not_counted_and_not_kept() -> None:
    turns = Turns()
    for position in range(1000):
        turns.taken([row(1, position)], float(position))
    turns.answered([row(7, 3)], 1000.0)  # of nothing that went in
    turns.answered([row(1, 999)], 1000.0)
    assert counted(turns, "decode") == (1.0, 1, 1)
    turns.answered([row(1, 998)], 1001.0)
    assert counted(turns, "decode") == (1.0, 1, 1)


class Meter:
    """Tells of echoes when it is told to."""

    def __init__(self) -> None:
        self.sent: list[Callable[[float], None]] = []

    def time(self, session: Session, told: Callable[[float], None]) -> None:
        self.sent.append(told)


def test_echoes_behind_rows_are_few_and_tell_round_trips_and_bandwidth() -> None:
    meter = Meter()
    times = RowTimes(cast(LinkMeter, meter))
    session: Any = None
    for step in range(1000):  # a token a millisecond
        times.sent(session, 4096, 10.0 + step / 1000)
    assert len(meter.sent) == pytest.approx(1 / EVERY_S, abs=1)
    for told in meter.sent:
        told(0.004)
    meter.sent.clear()
    times.sent(session, 2 * BULK_BYTES, 20.0)
    times.sent(session, 2 * BULK_BYTES, 20.1)  # may wait behind the first one
    times.sent(session, 4096, 20.2)
    times.sent(session, 2 * BULK_BYTES, 20.2 + BULK_EVERY_S)
    assert len(meter.sent) == 2
    meter.sent[0](0.024)
    figures = times.figures()
    assert figures["next_trips_s"] / figures["next_trips"] == pytest.approx(0.004)
    assert (figures["next_bulks"], figures["next_bulks_bytes"]) == (1, 2 * BULK_BYTES)
    assert figures["next_bulks_s"] == pytest.approx(0.024)
