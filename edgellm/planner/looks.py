"""What a stage did between two looks at it, and what that should have taken. Pure.

Counters are a stage's own since it was loaded, so that a look says what they grew by. Seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgellm.planner.inputs import StageWork
from edgellm.planner.pace import Parts, parts_of
from edgellm.planner.speeds import DeviceSpeed
from edgellm.types import DeviceId

MIN_STEPS = 16
"""Tokens of an answer, at least, that a look at a stage must have seen to say anything."""
MIN_PROMPT = 32
"""The same for tokens of prompts."""
_LEAST_FLOW_S = 2e-3
"""Rows that took less say nothing of a link's bandwidth: an event loop may take half of that."""
_LEAST_PART = 0.1
"""Never less than this part of what they took is their bytes."""
_COUNTED = ("s", "steps", "tokens")


@dataclass(frozen=True, slots=True)
class Counted:
    """What the counters of a stage grew by between two looks. Seconds are those that its node saw
    it take: the engine's and, of each step, what handling it took."""

    decode_s: float = 0.0
    decode_steps: int = 0
    """Calls with one token of each sequence in them."""
    decode_tokens: int = 0
    prefill_s: float = 0.0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prompts: int = 0
    """Each has one row of logits."""

    @classmethod
    def between(
        cls,
        before: Mapping[str, int | float],
        after: Mapping[str, int | float],
        prompts: int = 0,
    ) -> Counted:
        """From two ``StageStats``. Nothing where they do not tell it, or where a counter fell: it
        is another process's."""
        names = [f"turn_{what}_{of}" for what in ("decode", "prefill") for of in _COUNTED]
        grew = [after.get(name, 0) - before.get(name, 0) for name in names]
        if names[0] not in after or min(grew) < 0:
            return cls()
        steps, tokens = int(grew[1]), int(grew[2])
        return cls(grew[0], steps, tokens, grew[3], int(grew[4]), int(grew[5]), prompts)

    @property
    def rows(self) -> float:
        """Sequences in a step of an answer, on average."""
        return self.decode_tokens / self.decode_steps if self.decode_steps else 1.0

    @property
    def chunk(self) -> float:
        """Tokens in a chunk of a prompt, on average."""
        return self.prefill_tokens / self.prefill_steps if self.prefill_steps else 0.0

    @property
    def step_s(self) -> float | None:
        """Of an answer; None where too few were seen."""
        if self.decode_steps < MIN_STEPS or self.decode_s <= 0:
            return None
        return self.decode_s / self.decode_steps

    @property
    def chunk_s(self) -> float | None:
        """Of a prompt; None where too little was seen."""
        if self.prefill_tokens < MIN_PROMPT or self.prefill_s <= 0 or not self.prefill_steps:
            return None
        return self.prefill_s / self.prefill_steps

    def __add__(self, other: Counted) -> Counted:
        return Counted(
            self.decode_s + other.decode_s,
            self.decode_steps + other.decode_steps,
            self.decode_tokens + other.decode_tokens,
            self.prefill_s + other.prefill_s,
            self.prefill_steps + other.prefill_steps,
            self.prefill_tokens + other.prefill_tokens,
            self.prompts + other.prompts,
        )

    @property
    def rest(self) -> Counted:
        """What was too little to say anything: the next look's begins with it."""
        few = (
            self
            if self.step_s is None
            else replace(self, decode_s=0.0, decode_steps=0, decode_tokens=0)
        )
        if self.chunk_s is None:
            return few
        return replace(few, prefill_s=0.0, prefill_steps=0, prefill_tokens=0, prompts=0)


@dataclass(frozen=True, slots=True)
class StageLook:
    """One look at one stage of a plan."""

    device_id: DeviceId
    speed: DeviceSpeed
    """The device's, as it was measured or is assumed."""
    measured: bool
    decode: StageWork
    """With as many tokens in the cache as there were in the answers, on average."""
    prefill: StageWork
    """The same for the prompts."""
    counted: Counted

    @property
    def heads(self) -> float:
        """Rows of logits that a chunk of a prompt had, on average."""
        return min(1.0, self.counted.prompts / max(1, self.counted.prefill_steps))

    @property
    def step_s(self) -> float:
        """What a step of an answer should have taken at the measured speed."""
        parts = parts_of(self.decode, self.speed)
        return decode_step_s(parts, self.counted.rows) + self.speed.handling_s

    @property
    def chunk_s(self) -> float:
        """The same for a chunk of a prompt."""
        parts = parts_of(self.prefill, self.speed)
        engine_s = chunk_step_s(parts, self.counted.chunk) + self.heads * parts.head_s
        return engine_s + self.speed.handling_s


def decode_step_s(parts: Parts, rows: float = 1.0) -> float:
    """The engine's seconds for one token of each of ``rows`` sequences: the weights are read once,
    unless computing takes longer; cells and logits are each sequence's own."""
    weights = max(parts.read_s, min(rows * parts.read_s, rows * parts.compute_s))
    return weights + rows * (parts.scan_s + parts.head_s) + parts.overhead_s


def chunk_step_s(parts: Parts, tokens: float) -> float:
    """The engine's seconds for a chunk of a prompt, without the head."""
    return max(tokens * parts.compute_s, parts.read_s) + parts.overhead_s


def link_of(
    before: Mapping[str, int | float], after: Mapping[str, int | float]
) -> tuple[float | None, float | None]:
    """Round trip and bytes a second of the link behind a stage, between two looks at its counters;
    None where nothing was timed, or too fast for a bandwidth to show."""

    def grew(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    trips, bulks = grew("next_trips"), grew("next_bulks")
    trip_s = grew("next_trips_s") / trips if trips > 0 else None
    if bulks <= 0:
        return trip_s, None
    bulk_s = grew("next_bulks_s") / bulks
    flowing_s = max(bulk_s - (trip_s or 0.0), bulk_s * _LEAST_PART)
    if flowing_s < _LEAST_FLOW_S:
        return trip_s, None
    return trip_s, grew("next_bulks_bytes") / bulks / flowing_s
