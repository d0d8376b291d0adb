"""Faults at random moments that a seed repeats, and what became of the tokens. Pure."""

from __future__ import annotations

import enum
import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Fault(enum.Enum):
    """What happens to a device that holds a stage of the answer under way."""

    KILL = "kill"
    """SIGKILL: the process is gone, its connections break at once."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT ten seconds later: it is silent, its connections stay."""
    LEAVE = "leave"
    """SIGTERM: it says goodbye and hands over."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One fault of one answer."""

    number: int
    fault: Fault
    victim: int
    """Which stage's device, from 0."""
    after_tokens: int
    """So many tokens of the answer are there; 0 is while the prompt is computed."""
    delay_s: float
    """After that."""


def seeded_trials(
    fault: Fault,
    count: int,
    *,
    seed: int,
    stages: int,
    tokens: int,
    spacing_s: float,
    prefill_s: float | None = None,
) -> list[Trial]:
    """``count`` trials whose moments are spread over answers of ``tokens`` tokens, one each
    ``spacing_s`` seconds; every stage has its turn. With ``prefill_s`` within that time before the
    first token."""
    chance = random.Random(f"{fault.value} {seed}")
    return [
        Trial(
            number=number,
            fault=fault,
            victim=number % stages,
            after_tokens=chance.randrange(1, tokens - 2) if prefill_s is None else 0,
            delay_s=chance.random() * spacing_s
            if prefill_s is None
            else chance.uniform(_BEGUN, _NOT_DONE) * prefill_s,
        )
        for number in range(count)
    ]


_BEGUN, _NOT_DONE = 0.3, 0.8
"""Shares of the time to the first token in which the prompt is under way for certain."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Tokens of an answer that are not as they should be."""

    lost: int = 0
    repeated: int = 0
    changed: int = 0

    def __add__(self, other: Damage) -> Damage:
        return Damage(
            self.lost + other.lost, self.repeated + other.repeated, self.changed + other.changed
        )


def damage_shown(positions: Sequence[int], wanted: int) -> Damage:
    """Of tokens as they were shown, by their positions: each must come once, in order, and
    ``wanted`` of them in all."""
    seen = set(positions)
    repeated = len(positions) - len(seen)
    jumps = sum(after != before + 1 for before, after in itertools.pairwise(positions))
    return Damage(lost=max(0, wanted - len(seen)), repeated=repeated, changed=jumps - repeated)


def damage_against(undisturbed: Sequence[int], tokens: Sequence[int]) -> Damage:
    """Of an answer in reference mode, which must be the undisturbed one."""
    changed = sum(a != b for a, b in zip(undisturbed, tokens, strict=False))
    missing = len(undisturbed) - len(tokens)
    return Damage(lost=max(0, missing), repeated=max(0, -missing), changed=changed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial did. Seconds from the fault, where they are known."""

    trial: Trial
    damage: Damage
    detect_s: float | None
    """Until the coordinator knew."""
    next_token_s: float | None
    """Until the first token that needed no part of what was lost."""
    ways: tuple[str, ...] = ()
    """How each recovery went on: replay, rows or pages."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the first recovery took, by part."""
    problem: str = ""
    """Why the answer ended early, if it did."""


@dataclass(frozen=True, slots=True)
class Series:
    """Trials of one kind, with one engine and mode."""

    name: str
    outcomes: tuple[Outcome, ...]

    @property
    def damage(self) -> Damage:
        return sum((outcome.damage for outcome in self.outcomes), Damage())

    @property
    def recovered(self) -> int:
        """Faults that struck while the answer was under way, and that it survived."""
        return sum(bool(outcome.ways) and not outcome.problem for outcome in self.outcomes)

    def times(self, name: str) -> list[float]:
        """``detect_s``, ``next_token_s``, or a part of the recoveries, where they are known."""
        found = (
            getattr(outcome, name, None) if name in _OWN else outcome.parts.get(name)
            for outcome in self.outcomes
        )
        return [each for each in found if each is not None]

    def to_dict(self) -> dict[str, Any]:
        names = sorted({part for outcome in self.outcomes for part in outcome.parts})
        ways = [way for outcome in self.outcomes for way in outcome.ways]
        return {
            "name": self.name,
            "trials": len(self.outcomes),
            "recovered": self.recovered,
            "lost": self.damage.lost,
            "repeated": self.damage.repeated,
            "changed": self.damage.changed,
            "ways": {way: ways.count(way) for way in sorted(set(ways))},
            **{name: percentiles(self.times(name)) for name in _OWN},
            "parts": {name: percentiles(self.times(name)) for name in names},
            "problems": [outcome.problem for outcome in self.outcomes if outcome.problem],
        }


_OWN = ("detect_s", "next_token_s")


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """``p50``, ``p95`` (the nearest of the values) and ``max``; None without any."""
    if not values:
        return None
    ordered = sorted(values)
    nearest = ordered[max(0, -(-95 * len(ordered) // 100) - 1)]
    return {
        "p50": round(statistics.median(ordered), 4),
        "p95": round(nearest, 4),
        "max": round(ordered[-1], 4),
    }
