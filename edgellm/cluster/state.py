"""What a device knows of the others: nouns and what can be read off them. Pure data.

Every time is a reading of the same clock, one that only goes forward, in seconds. Nothing in this
file changes anything: that is ``apply``'s.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edgellm.types import DeviceId

MAX_MEMBERS = 256
"""Kept in mind at once, those that are not there included."""
MAX_PROBLEM = 100
"""Characters of a reason: all members have to fit into one message."""
NEVER, FOREVER = float("-inf"), float("inf")


class MemberState(enum.StrEnum):
    """Of a device, as seen from here."""

    ALIVE = "alive"
    SUSPECTED = "suspected"
    """Silent for longer than usual, or its last connection ended just now."""
    GONE = "gone"
    """Silent for so long, or so unreachable, that nobody should wait for it."""
    LEFT = "left"
    """It said goodbye."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, unless it says otherwise."""

    tick_s: float = 0.5
    """At least so often somebody looks."""
    suspect_after_s: float = 2.0
    """Four heartbeats."""
    dead_after_s: float = 5.0
    background_dead_after_s: float = 15.0
    """For a phone whose page is in the background: its system lets it run now and then only."""
    max_lag_s: float = 0.5
    """Who looks later than this was itself stopped, and accuses nobody for what it missed."""
    probe_every_s: float = 2.0
    helpers: int = 2
    """Devices that are asked about one that is suspected."""


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the cluster."""

    device_id: DeviceId
    name: str
    state: MemberState
    since: float
    """When it came to be in this state, or when its present run was first met."""
    dead_after_s: float
    boot: int = 0
    """Of its newest run that was met: how often its node has started. 0: it was not met yet."""
    sessions: frozenset[int] = frozenset()
    """Open connections to that run."""
    heard: float = NEVER
    """When something came from it."""
    heard_elsewhere: float = NEVER
    """When something came from it to a device that we asked."""
    asked: float = NEVER
    """When others were asked about it."""
    leaving: bool = False
    """Whether this run said goodbye."""
    refused: int = 0
    """The latest older run that was refused."""
    problem: str = ""
    """Why it is not alive, in words, without the full stop; or why it is leaving."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The other devices, by id. Replaced, never changed."""

    policy: Policy = field(default_factory=Policy)
    members: Mapping[DeviceId, Member] = field(default_factory=lambda: MappingProxyType({}))
    anew: float = NEVER
    """Silence counts from here at the earliest: we did not listen before."""


def silent_since(state: ClusterState, member: Member) -> float:
    """From when on the member's silence counts."""
    return max(member.heard, state.anew)


def dead_at(state: ClusterState, member: Member) -> float:
    """When nobody will have heard of the member for too long, unless somebody does."""
    return max(silent_since(state, member), member.heard_elsewhere) + member.dead_after_s


def silent_s(member: Member | None, now: float, never: float) -> float:
    """How long nothing has come from a device here; ``never`` where nothing ever did."""
    if member is None or member.heard == NEVER:
        return never
    return max(0.0, now - member.heard)


def facts(member: Member, now: float) -> dict[str, Any]:
    """A member as plain data, as ``MembersSeen`` carries it; ``silent_s`` is None where nothing
    was ever heard of it."""
    return {
        "device_id": str(member.device_id),
        "name": member.name,
        "state": member.state.value,
        "since_s": max(0.0, now - member.since),
        "silent_s": None if member.heard == NEVER else silent_s(member, now, 0.0),
        "boot": member.boot,
        "problem": member.problem,
    }
