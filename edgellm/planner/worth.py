"""Whether a better plan pays for the move to it. Pure: seconds in, a verdict in words out.

Noise must not move layers, and neither may two plans that are nearly as good take turns: a move has
to be clearly better, to pay within what is likely still to come, and not to undo an earlier one.
Time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from edgellm.planner.reasons import listed, seconds
from edgellm.types import Plan

BETTER = 0.10
"""A request must take less by this part."""
PAYS = 2.0
"""What is saved must come to so many times what the move takes: both are estimates."""
PAYS_WAITING = 4.0
"""The same where requests have to wait for it."""
MOST_REQUESTS = 64
"""No more than so many are expected to come, however many there were."""
REMEMBERED = 0.8
"""What a request counts of what the one after it does, for what is usual."""
COOLDOWN_S = 60.0
"""From one move to the next."""
KEEP_AWAY_S = 900.0
"""A device that gave up layers gets none back for so long; twice as long after each further time.
While it has none, nothing is seen of it but that it was slow."""
FAILED_S = 120.0
"""After a move that failed; twice as long after each further one."""
_MOST_DOUBLINGS = 6


@dataclass(frozen=True, slots=True)
class Outlay:
    """What a move takes. Seconds and bytes, estimated."""

    load_s: float
    """Until the new stages are there: fetching what their devices lack, and loading."""
    fetch_bytes: int = 0
    replay_s: float = 0.0
    """Computing again what the old stages hold of conversations that go on."""
    waits: bool = False
    """A device has no room for its new stage beside the old one: requests wait while it loads."""

    @property
    def total_s(self) -> float:
        return self.load_s + self.replay_s


@dataclass(frozen=True, slots=True)
class Shed:
    """A device that gave up layers."""

    until: float
    times: int


@dataclass(frozen=True, slots=True)
class Record:
    """The moves of one loaded model so far."""

    moved_at: float | None = None
    shed: Mapping[str, Shed] = field(default_factory=lambda: MappingProxyType({}))
    failed_at: float = 0.0
    failures: int = 0
    """In a row."""

    def after(self, before: Plan, plan: Plan, now: float) -> Record:
        """With a move that was made."""
        shed = dict(self.shed)
        for device, change in _changes(before, plan).items():
            if change < 0:
                known = shed.get(device)
                times = 0 if known is None else known.times
                away = KEEP_AWAY_S * 2 ** min(times, _MOST_DOUBLINGS)
                shed[device] = Shed(now + away, times + 1)
        return Record(now, MappingProxyType(shed))

    def failed(self, now: float) -> Record:
        """With one that was not."""
        return replace(self, failed_at=now, failures=self.failures + 1)

    def refusal(self, before: Plan, plan: Plan, now: float) -> str:
        """Why this move may not be made now; empty where it may."""
        if self.failures:
            wait = FAILED_S * 2 ** min(self.failures - 1, _MOST_DOUBLINGS)
            if now < self.failed_at + wait:
                return f"the last move failed {now - self.failed_at:.0f} s ago"
        if self.moved_at is not None and now < self.moved_at + COOLDOWN_S:
            return f"layers moved {now - self.moved_at:.0f} s ago"
        back = [
            device
            for device, change in _changes(before, plan).items()
            if change > 0 and device in self.shed and now < self.shed[device].until
        ]
        if back:
            return f"{listed(back)} gave up layers not long ago"
        return ""


def _changes(before: Plan, plan: Plan) -> dict[str, int]:
    """By device: how many layers more it has in ``plan``."""
    changes: dict[str, int] = {}
    for one, sign in ((before, -1), (plan, 1)):
        for stage in one.stages:
            changes[stage.device] = changes.get(stage.device, 0) + sign * len(stage.span)
    return changes


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to move, and why."""

    worth: bool
    reason: str
    """In words, without a full stop."""
    gain: float = 0.0
    """The part of a request's time that is saved."""
    net_s: float = 0.0
    """What is saved over all that is expected, less what the move takes."""


@dataclass(frozen=True, slots=True)
class Usual:
    """What requests were like so far, the later ones most."""

    requests: int = 0
    prompt_tokens: float = 0.0
    """That had to be computed."""
    held_tokens: float = 0.0
    """Of prompts, that were held from before."""
    made: float = 0.0
    latest: float = 0.0
    """What the latest request counts in these."""

    def after(self, requests: int, prompt_tokens: int, computed: int, made: int) -> Usual:
        """With so many more requests; of their prompts, so many tokens had to be computed. Without
        any, what was made is the rest of the latest one's."""
        if not requests:
            return replace(self, made=self.made + made * self.latest)
        left = REMEMBERED**requests if self.requests else 0.0
        each = (1 - left) / requests
        computed = min(computed, prompt_tokens)
        return Usual(
            self.requests + requests,
            self.prompt_tokens * left + computed * each,
            self.held_tokens * left + (prompt_tokens - computed) * each,
            self.made * left + made * each,
            each,
        )

    @property
    def expected(self) -> float:
        """How many more requests are likely to come: as many as came, for want of anything
        better."""
        return float(min(max(self.requests, 1), MOST_REQUESTS))


def worth_moving(
    present_s: float,
    better_s: float,
    outlay: Outlay,
    requests: float,
    refusal: str = "",
) -> Verdict:
    """Whether a plan on which a request takes ``better_s`` pays for the move to it from one on
    which it takes ``present_s``, with so many ``requests`` to come. Seconds, weighted as the
    objective does it; ``refusal`` is what ``Record`` says against it."""
    saved = present_s - better_s
    if not (present_s > 0 and better_s > 0 and saved > 0):  # also NaN
        return Verdict(False, "no plan is better than the present one")
    gain = saved / present_s
    net_s = saved * requests - outlay.total_s
    told = f"a request takes {seconds(better_s)} instead of {seconds(present_s)}"
    if gain < BETTER:
        return Verdict(False, f"{told}: too little to move for ({gain:.0%})", gain, net_s)
    moving = f"moving takes about {seconds(outlay.total_s)}"
    pays = max(1, -int(-outlay.total_s // saved))
    if saved * requests < (PAYS_WAITING if outlay.waits else PAYS) * outlay.total_s:
        few = f"{moving}, which {_many(pays)} would make good, and {requests:.0f} are expected"
        return Verdict(False, f"{told}, but {few}", gain, net_s)
    if refusal:
        return Verdict(False, f"{told}, but {refusal}", gain, net_s)
    return Verdict(True, f"{told}; {moving}, which {_many(pays)} make good", gain, net_s)


def _many(requests: int) -> str:
    return "one request" if requests == 1 else f"{requests} requests"
