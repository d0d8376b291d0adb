"""What a stage and the link behind it take, beside what was expected of them: figures and words.

Pure. The coordinator finds them, the stage's device keeps them for people who ask (``edgellm ps``):
what comes back from there is checked as anything from another device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

MOST_S = 1e6
MOST_BYTES = 1e12
_NOTED = 1.25
"""Up to so many times slower, or faster, is not worth a word."""
_NOTED_LINK_S = 0.3e-3
"""And of a link it must be so much a token: an event loop takes as long to answer."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Of one stage. Seconds and bytes; None: not seen yet, or not there."""

    measured: bool = False
    """Whether its device's speed was; else what is expected is an assumption."""
    step_s: float | None = None
    """The stage's, for one token of an answer: the engine's, and what handling a step takes."""
    step_expected_s: float | None = None
    prompt_s: float | None = None
    """The stage's, for one token of a prompt."""
    prompt_expected_s: float | None = None
    link_s: float | None = None
    """One token's row on its way to the next stage, or the token back to the coordinator."""
    link_expected_s: float | None = None
    link_bytes: float | None = None
    """Of an answer's token."""
    link_expected_bytes: float | None = None
    trip_s: float | None = None
    """The link's round trip."""
    trip_expected_s: float | None = None
    token_s: float | None = None
    """A token of an answer at the coordinator: all stages and links, and everything else."""
    token_expected_s: float | None = None

    def to_plain(self) -> dict[str, int | float]:
        """Numbers by name, without those that are not known."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value + 0 for name, value in told.items() if value is not None}

    @classmethod
    def from_plain(cls, plain: Mapping[str, object]) -> Compared:
        """From whatever a device says: what is no sensible number counts as not known."""
        known = {
            each.name: _sensible(plain.get(each.name), each.name.endswith("_bytes"))
            for each in fields(cls)
            if each.name != "measured"
        }
        return cls(measured=plain.get("measured") == 1, **known)

    @property
    def slowness(self) -> float | None:
        """How many times longer than expected a token of an answer takes at the stage."""
        return _ratio(self.step_s, self.step_expected_s)

    @property
    def slowness_of_prompts(self) -> float | None:
        return _ratio(self.prompt_s, self.prompt_expected_s)


def _sensible(value: object, of_bytes: bool) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= (MOST_BYTES if of_bytes else MOST_S) else None


def _ratio(found: float | None, expected: float | None) -> float | None:
    if found is None or not expected:
        return None
    ratio = found / expected
    return ratio if 0 < ratio < math.inf else None


def words_of(device: str, following: str, compared: Compared) -> tuple[str, ...]:
    """What is not as expected, in words: of the device, and of the link from it to the one
    ``following``. Empty where all is."""
    said = []
    of_prompts, ratio = compared.slowness_of_prompts, compared.slowness
    than = "measured" if compared.measured else "assumed (it was not measured)"
    if _noted(ratio) or _noted(of_prompts):
        main = ratio if _noted(ratio) or of_prompts is None else of_prompts
        words = f"{device} is {_times(main)}"
        if main is not ratio:
            words += " at prompts"
        elif _noted(of_prompts) and (ratio is None or _times(of_prompts) != _times(ratio)):
            words += f" ({_times(of_prompts)} at prompts)"
        why = ""
        if compared.measured:
            why = ": another program?" if (main or 1.0) > 1 else ": was it busy then?"
        said.append(f"{words} than {than}{why}")
    link, should = compared.link_s, compared.link_expected_s
    if link is not None and should is not None and abs(link - should) > _NOTED_LINK_S:
        ratio = link / max(should, _NOTED_LINK_S)
        if ratio >= _NOTED:
            said.append(
                f"the link from {device} to {following} is {ratio:.1f} x slower than expected"
            )
    return tuple(said)


def _noted(ratio: float | None) -> bool:
    return ratio is not None and not 1 / _NOTED < ratio < _NOTED


def _times(ratio: float | None) -> str:
    if ratio is None or ratio >= 1:
        return f"{ratio or 1.0:.1f} x slower"
    return f"{1 / ratio:.1f} x faster"
