"""How far a load is, for people: which device does which part, from whom, how long still.

``LoadState`` is pure (time is an argument); ``shown_progress`` draws it on standard error, moving
on a terminal, else as a line at changes and at most one a second for a device.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

LINE_EVERY_S = 1.0
MIN_ESTIMATE_S = 0.5
"""A part that is younger has no rate to speak of."""
_BYTES_FROM = 4096
"""A total below counts steps, not bytes."""
_BAR_COLUMNS = 24
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


class Progressed(Protocol):
    """What a device reports: ``wire.messages.LoadProgress``."""

    @property
    def index(self) -> int: ...

    @property
    def part(self) -> str: ...

    @property
    def done(self) -> int: ...

    @property
    def total(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a device does for a load."""

    device: str
    name: str
    """``hash``, ``fetch from b``, ``copy``, ``verify``, ``load``, ..."""
    done: int
    total: int
    """Bytes, or steps where it is small; 0 where it is not known."""
    began_s: float
    began_at: int
    """What was done already when it began: an earlier try is no speed of this one."""

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 0.0

    def remaining_s(self, now: float) -> float | None:
        """Seconds until it is done, if it goes on as it went; None where that is not known."""
        spent, moved = now - self.began_s, self.done - self.began_at
        if spent < MIN_ESTIMATE_S or moved <= 0 or not self.total:
            return None
        return (self.total - self.done) * spent / moved

    def words(self, now: float) -> str:
        """``kitchen: fetch from attic, 120 of 300 MiB, 12 s left``."""
        said = [f"{self.device}: {self.name}"]
        if self.total:
            said.append(amount(self.done, self.total))
        remaining = self.remaining_s(now)
        if remaining is not None and self.done < self.total:
            said.append(f"{duration(remaining)} left")
        return ", ".join(said)


class LoadState:
    """What every device does at the moment. Several parts of one kind (fetches from several
    sources) stand side by side; another kind takes their place."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int, str], Part] = {}

    def note(self, device: str, report: Progressed, now: float) -> tuple[Part, bool]:
        """Take a report in. Gives its part, and whether that has just begun."""
        key = (device, report.index, report.part)
        known = self._parts.get(key)
        begins = known is None or report.done < known.done
        if known is None or begins:
            part = Part(device, report.part, report.done, report.total, now, report.done)
        else:
            part = replace(known, done=report.done, total=report.total)
        kind = _kind(report.part)
        others = {
            other: value
            for other, value in self._parts.items()
            if other[:2] != key[:2] or _kind(other[2]) == kind
        }
        self._parts = {**others, key: part}  # a new one: the screen's thread may be reading
        return part, begins

    @property
    def parts(self) -> list[Part]:
        """By device, in the order in which they were first heard of."""
        return list(self._parts.values())


class LineRate:
    """Which reports become lines where nothing can move."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def wants(self, part: Part, begins: bool, now: float) -> bool:
        """At changes, and at most once a second for a device."""
        last = self._told.get(part.device)
        if not begins and last is not None and now - last < LINE_EVERY_S:
            return False
        self._told[part.device] = now
        return True


@contextlib.contextmanager
def shown_progress(
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[str, Progressed], None]]:
    """What ``Cluster.load(progress=...)`` takes. Nothing is left on a terminal afterwards."""
    state = LoadState()
    if not sys.stderr.isatty():
        rate = LineRate()

        def line(device: str, report: Progressed) -> None:
            now = clock()
            part, begins = state.note(device, report, now)
            if rate.wants(part, begins, now):
                sys.stderr.write(part.words(now) + "\n")
                sys.stderr.flush()

        yield line
        return
    live = Live(
        console=Console(stderr=True, highlight=False, markup=False),
        get_renderable=lambda: picture(state.parts, clock()),
        refresh_per_second=8,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        yield lambda device, report: _ignore(state.note(device, report, clock()))


def picture(parts: list[Part], now: float) -> Table | Group:
    """The parts as lines with bars."""
    if not parts:
        return Group("Loading ...")
    table = Table.grid(padding=(0, 1))
    for part in parts:
        remaining = part.remaining_s(now)
        table.add_row(
            part.device,
            part.name,
            ProgressBar(part.total, part.done, width=_BAR_COLUMNS) if part.total else "",
            amount(part.done, part.total) if part.total else "",
            f"{duration(remaining)} left" if remaining and part.done < part.total else "",
        )
    return table


def amount(done: int, total: int) -> str:
    """``120 of 300 MiB``, or ``2 of 3`` for steps."""
    if total < _BYTES_FROM:
        return f"{done} of {total}"
    unit, size = next((unit, size) for unit, size in _UNITS if total >= size)
    digits = 1 if total < 10 * size else 0
    return f"{done / size:.{digits}f} of {total / size:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``1 h 5 min``: rounded up, so that it is never 0 s."""
    whole = max(1, int(-(-seconds // 1)))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _kind(part: str) -> str:
    return part.partition(" ")[0]


def _ignore(_: object) -> None:
    """A report is taken in; the screen looks at the state when it likes."""
