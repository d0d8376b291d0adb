"""What can happen to a cluster, and what can have to be done about it. Pure data.

Sessions are numbers here: whoever feeds the events gives each connection its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from edgellm.cluster.state import Member, MemberState
from edgellm.types import DeviceId

# --- events -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """This device belongs to the cluster, whether it is there or not."""

    device_id: DeviceId
    name: str


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A node greeted, on a connection that either side dialed."""

    device_id: DeviceId
    name: str
    boot: int
    """At least 1: commands of a device, which say 0, are no nodes."""
    session: int


@dataclass(frozen=True, slots=True)
class SessionClosed:
    device_id: DeviceId
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """Something came from a device, whatever it was."""

    device_id: DeviceId
    at: float


@dataclass(frozen=True, slots=True)
class DialFailed:
    """It was tried again, at all of its addresses, and does not answer."""

    device_id: DeviceId
    problem: str


@dataclass(frozen=True, slots=True)
class ProbeAnswered:
    """What another device says when asked about this one."""

    device_id: DeviceId
    by: str
    """Name of who answers."""
    silent_s: float


@dataclass(frozen=True, slots=True)
class GoodbyeSaid:
    """A device is about to end on purpose."""

    device_id: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class InBackground:
    """A device says that its system lets it run now and then only, or no longer so."""

    device_id: DeviceId
    background: bool


@dataclass(frozen=True, slots=True)
class Forgotten:
    """This device belongs to the cluster no more."""

    device_id: DeviceId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by. All that was heard up to now has been told before this."""

    due: float
    """When this was meant to come."""


Event: TypeAlias = (
    Expected
    | SessionOpened
    | SessionClosed
    | Heard
    | DialFailed
    | ProbeAnswered
    | GoodbyeSaid
    | InBackground
    | Forgotten
    | Tick
)

# --- effects ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Hang up. The state counts this session no more; its end need not be told."""

    session: int


@dataclass(frozen=True, slots=True)
class AskPeers:
    """Ask these devices when they last heard of that one."""

    device_id: DeviceId
    helpers: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class DialSoon:
    """There is reason to try this device now, unless we are connected by a dial of ours."""

    device_id: DeviceId


@dataclass(frozen=True, slots=True)
class DialRarely:
    """It will be away: once its connections end, do not try it all the time."""

    device_id: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A device came to be in another state, or in another run."""

    member: Member
    before: MemberState | None
    """None: it was not known."""


@dataclass(frozen=True, slots=True)
class RunRefused:
    """An older run of a device was here, or a copy of it. Told once for each run."""

    member: Member
    boot: int


Effect: TypeAlias = CloseSession | AskPeers | DialSoon | DialRarely | MemberChanged | RunRefused
