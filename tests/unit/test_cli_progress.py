"""How far a load is: rates, estimates and lines, without a clock and without a screen."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from rich.console import Console

from edgellm.cli.progress import (
    LineRate,
    LoadState,
    amount,
    duration,
    picture,
    shown_progress,
)

MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """As a device sends it."""

    part: str
    done: int
    total: int
    index: int = 0


def test_words_say_who_from_whom_how_far_and_how_long_still() -> None:
    state = LoadState()
    part, begins = state.note("kitchen", Report("fetch from attic", 0, 300 * MIB), 10.0)
    assert begins
    assert part.words(10.0) == "kitchen: fetch from attic, 0 of 300 MiB"
    part, begins = state.note("kitchen", Report("fetch from attic", 100 * MIB, 300 * MIB), 15.0)
    assert not begins
    assert part.words(15.0) == "kitchen: fetch from attic, 100 of 300 MiB, 10 s left"
    assert part.words(20.0).endswith("20 s left"), "nothing came since: it takes longer"


def test_what_was_there_already_is_no_speed() -> None:
    """A fetch that is resumed at 200 of 300."""
    state = LoadState()
    state.note("b", Report("fetch", 200 * MIB, 300 * MIB), 0.0)
    part, _ = state.note("b", Report("fetch", 210 * MIB, 300 * MIB), 1.0)
    assert part.remaining_s(1.0) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("reports", "now"),
    [
        ([(0, 100)], 5.0),  # nothing moved
        ([(0, 100), (10, 100)], 0.1),  # too young
        ([(0, 0), (0, 0)], 5.0),  # nobody knows how much
    ],
)
def test_no_estimate_without_ground(reports: list[tuple[int, int]], now: float) -> None:
    state = LoadState()
    for done, total in reports:
        part, _ = state.note("b", Report("fetch", done, total), 0.0)
    assert part.remaining_s(now) is None


def test_a_done_part_has_no_time_left() -> None:
    state = LoadState()
    state.note("b", Report("fetch", 0, 8 * MIB), 0.0)
    part, _ = state.note("b", Report("fetch", 8 * MIB, 8 * MIB), 2.0)
    assert part.words(2.0) == "b: fetch, 8.0 of 8.0 MiB"


def test_sources_stand_side_by_side_and_give_way_to_the_next_part() -> None:
    state = LoadState()
    state.note("a", Report("hash", 1, 9), 0.0)
    state.note("b", Report("fetch from a", 1, 9), 0.0)
    state.note("b", Report("fetch from c", 2, 9), 0.0)
    assert [(part.device, part.name) for part in state.parts] == [
        ("a", "hash"), ("b", "fetch from a"), ("b", "fetch from c"),
    ]  # fmt: skip
    state.note("b", Report("load", 0, 1), 1.0)
    assert [(part.device, part.name) for part in state.parts] == [("a", "hash"), ("b", "load")]


def test_two_stages_of_a_device_do_not_hide_each_other() -> None:
    state = LoadState()
    state.note("a", Report("fetch", 1, 9, index=0), 0.0)
    state.note("a", Report("load", 0, 1, index=2), 0.0)
    assert [part.name for part in state.parts] == ["fetch", "load"]


def test_a_part_that_starts_over_begins_again() -> None:
    state = LoadState()
    state.note("a", Report("fetch", 9, 10), 0.0)
    part, begins = state.note("a", Report("fetch", 0, 10), 5.0)
    assert begins
    assert part.began_s == 5.0


def test_lines_come_at_changes_and_at_most_once_a_second() -> None:
    state, rate = LoadState(), LineRate()
    told = []
    for tick in range(31):
        now = tick / 10
        name = "fetch" if tick < 15 else "load"
        part, begins = state.note("b", Report(name, tick, 100), now)
        if rate.wants(part, begins, now):
            told.append((tick, part.name))
    assert told == [(0, "fetch"), (10, "fetch"), (15, "load"), (25, "load")]


def test_the_picture_has_a_line_for_each_part() -> None:
    state = LoadState()
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(picture(state.parts, 0.0))
    assert capture.get().strip() == "Loading ..."
    state.note("a", Report("hash", 3, 0), 0.0)
    state.note("kitchen", Report("fetch from a", 0, 3 << 30), 0.0)
    state.note("kitchen", Report("fetch from a", 1 << 30, 3 << 30), 60.0)
    with console.capture() as capture:
        console.print(picture(state.parts, 60.0))
    first, second = capture.get().splitlines()
    assert first.split() == ["a", "hash"]
    for words in ("kitchen", "fetch from a", "1.0 of 3.0 GiB", "2 min 0 s left"):
        assert words in second


def test_without_a_terminal_it_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 0.5, 1.5])
    with shown_progress(lambda: next(times)) as progress:
        for done in (0, 1, 2):
            progress("b", Report("fetch from a", done * MIB, 2 * MIB))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "b: fetch from a, 0.0 of 2.0 MiB\nb: fetch from a, 2.0 of 2.0 MiB\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "1 s"), (0.2, "1 s"), (59.1, "1 min 0 s"), (200.0, "3 min 20 s"), (3900.0, "1 h 5 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("done", "total", "words"),
    [
        (2, 3, "2 of 3"),
        (0, 8192, "0.0 of 8.0 KiB"),
        (120 * MIB, 300 * MIB, "120 of 300 MiB"),
        (1 << 30, 40 << 30, "1 of 40 GiB"),
    ],
)
def test_amounts(done: int, total: int, words: str) -> None:
    assert amount(done, total) == words
