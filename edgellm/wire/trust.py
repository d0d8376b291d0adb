"""Messages about who belongs to the cluster, and who is there. Pure data; see ``vocabulary``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from edgellm.wire.frames import Buffer


@dataclass(frozen=True, slots=True)
class QueryMembers:
    """Asks a node for ``MembersSeen``."""


@dataclass(frozen=True, slots=True)
class MembersSeen:
    """The devices of the cluster as the sender sees them, each as plain data: see ``cluster``."""

    members: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Introduce:
    """A device that belongs to the cluster, or does no more. Payload: its certificate (DER)."""

    device_id: str
    """64 lower-case hex digits: SHA-256 of the certificate."""
    name: str
    version: int
    """Of two records of one device the one with the higher version counts."""
    forgotten: bool
    introduced_by: str
    """Device id of who let it in, or put it out."""
    payload: Buffer


@dataclass(frozen=True, slots=True)
class OpenInvitation:
    """A command to its own device's node: let one more device in. Answer: ``InvitationOpen``."""

    request: int
    within_s: float
    """How long the invitation is to last; 0 ends the one that is open."""


@dataclass(frozen=True, slots=True)
class InvitationOpen:
    request: int
    code: str
    """Empty where there is a problem."""
    expires_s: float
    problem: str


@dataclass(frozen=True, slots=True)
class InvitationNews:
    """To who opened an invitation: what came of it. Sent at every try, and at its end."""

    request: int
    over: bool
    """Whether nobody can join by it any more."""
    device_id: str
    """Who joined; empty where nobody did."""
    name: str
    problem: str
    """Why somebody did not join, or why it is over without anybody."""


@dataclass(frozen=True, slots=True)
class Forget:
    """A command to its own device's node: this device belongs to us no more."""

    request: int
    device_id: str


@dataclass(frozen=True, slots=True)
class Forgot:
    request: int
    problem: str


@dataclass(frozen=True, slots=True)
class Leave:
    """A command to its own device's node: hand over what you hold, then end."""

    request: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender is about to end on purpose. Coordinators take its stages elsewhere before that."""

    reason: str
    within_s: float
    """After so many seconds it goes, whatever is still there."""


@dataclass(frozen=True, slots=True)
class ProbePeer:
    """Can you reach this device? Asked when the asker hears nothing of it any more."""

    request: int
    device_id: str


@dataclass(frozen=True, slots=True)
class PeerProbed:
    request: int
    silent_s: float
    """How long the answerer has heard nothing of it; a large number where it never did."""


TrustMessage: TypeAlias = (
    QueryMembers
    | MembersSeen
    | Introduce
    | OpenInvitation
    | InvitationOpen
    | InvitationNews
    | Forget
    | Forgot
    | Leave
    | Goodbye
    | ProbePeer
    | PeerProbed
)
