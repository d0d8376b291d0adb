"""Who of the cluster is there, as one device sees it.

Pure: events in, effects out as data, and time is an argument.
``runtime.membership`` feeds the events and carries out the effects.
"""

from __future__ import annotations

from edgellm.cluster.apply import apply, next_tick
from edgellm.cluster.events import (
    AskPeers,
    CloseSession,
    DialFailed,
    DialRarely,
    DialSoon,
    Effect,
    Event,
    Expected,
    Forgotten,
    GoodbyeSaid,
    Heard,
    InBackground,
    MemberChanged,
    ProbeAnswered,
    RunRefused,
    SessionClosed,
    SessionOpened,
    Tick,
)
from edgellm.cluster.state import ClusterState, Member, MemberState, Policy, facts, silent_s

__all__ = [
    "AskPeers",
    "CloseSession",
    "ClusterState",
    "DialFailed",
    "DialRarely",
    "DialSoon",
    "Effect",
    "Event",
    "Expected",
    "Forgotten",
    "GoodbyeSaid",
    "Heard",
    "InBackground",
    "Member",
    "MemberChanged",
    "MemberState",
    "Policy",
    "ProbeAnswered",
    "RunRefused",
    "SessionClosed",
    "SessionOpened",
    "Tick",
    "apply",
    "facts",
    "next_tick",
    "silent_s",
]
