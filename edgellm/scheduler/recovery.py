"""Which way a loaded model goes on after a device was lost: by estimated seconds. Pure.

Two ways keep every token: all stages anew over whoever is left, with everything computed again
(``replay``); or only the lost stage anew on another device, while the others keep their KV and the
stage before sends its rows again (``rows``). The estimates need not be right, only right enough to
tell the two apart.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

START_S = 0.3
"""What a stage process takes before it loads anything."""
LOAD_BYTES_PER_S = 1e9
"""From a disk that has just been read, or was written, into memory."""
REBIND_S = 0.01
"""What a stage takes that stays as it is: a message, perhaps a connection."""


class Kind(enum.StrEnum):
    """How a model goes on."""

    REPLAY = "replay"
    ROWS = "rows"
    PAGES = "pages"


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage of a plan takes to be there, and to compute. Seconds, bytes."""

    fresh: bool
    """Whether it must be loaded; else it stays as it is, with its KV."""
    load_bytes: int
    fetch_bytes: int
    """Of these, what must come over a link first."""
    fetch_bytes_per_s: float
    decode_s: float
    """Of one token."""
    chunk_s: float
    """Of one chunk of a prompt."""
    row_s: float
    """Of one token's row on the link into it, without latency."""

    @property
    def ready_s(self) -> float:
        """Until it can compute."""
        if not self.fresh:
            return REBIND_S
        return (
            START_S
            + self.load_bytes / LOAD_BYTES_PER_S
            + self.fetch_bytes / max(self.fetch_bytes_per_s, 1.0)
        )


@dataclass(frozen=True, slots=True)
class Journal:
    """One request that goes on."""

    prompt: int
    """Tokens."""
    made: int
    chunk: int
    """Tokens in each chunk of the prompt."""


@dataclass(frozen=True, slots=True)
class Choice:
    kind: Kind
    reason: str
    """In words, with the estimates."""


def load_s(stages: Sequence[StageCost]) -> float:
    """Until all stages can compute: they load at the same time."""
    return max((stage.ready_s for stage in stages), default=0.0)


def replay_s(stages: Sequence[StageCost], journals: Sequence[Journal], *, exact: bool) -> float:
    """Until fresh stages hold what the journals say. The others compute nothing, the fresh ones
    work like a pipeline: it takes as long as the slowest of them, or of the links into them."""
    fresh = [stage for stage in stages if stage.fresh]
    if not journals or not fresh:
        return 0.0
    slowest = 0.0
    for stage in fresh:
        work = 0.0
        for journal in journals:
            single = journal.made if exact else 0
            chunked = journal.prompt + journal.made - single
            chunks = -(-chunked // journal.chunk)
            work += max(
                chunks * stage.chunk_s + single * stage.decode_s,
                (chunked + single) * stage.row_s,
            )
        slowest = max(slowest, work)
    return slowest + sum(stage.chunk_s for stage in fresh)


def choose(
    replay: Sequence[StageCost] | None,
    rows: Sequence[StageCost] | None,
    journals: Sequence[Journal],
    *,
    exact: bool,
    lost: str,
) -> Choice:
    """The quicker of the ways that there are; of equals the one that moves less.

    ``replay`` and ``rows`` are the stages of the plan of each way, None where it is not open; one
    of them must be. ``lost`` names the device.
    """
    if rows is None:
        return Choice(Kind.REPLAY, f"{lost} was lost, and no spare device can take its layers")
    rows_s = load_s(rows) + replay_s(rows, journals, exact=exact)
    if replay is None:
        return Choice(Kind.ROWS, f"{lost} was lost, and no other plan fits than one device for it")
    all_s = load_s(replay) + replay_s(replay, journals, exact=exact)
    if rows_s <= all_s:
        why = f"its layers alone anew take about {rows_s:.1f} s, all stages {all_s:.1f} s"
        return Choice(Kind.ROWS, f"{lost} was lost: {why}")
    why = f"all stages anew take about {all_s:.1f} s, its layers alone {rows_s:.1f} s"
    return Choice(Kind.REPLAY, f"{lost} was lost: {why}")
