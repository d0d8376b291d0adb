"""Every decision about who is there: an event and the time in, the new state and effects out. Pure.

Two rules keep a device from being buried alive. Only silence by our own clock, while we listened,
counts against a connected device; and nobody speaks for others: what a device finds out here is
its own view, and a device that somebody else still hears is not gone but out of *our* reach.
A device is gone sooner only where nobody is there any more to be silent: all its connections
ended and, dialed again, it does not answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

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
from edgellm.cluster.state import (
    FOREVER,
    MAX_MEMBERS,
    MAX_PROBLEM,
    NEVER,
    ClusterState,
    Member,
    MemberState,
    dead_at,
    silent_since,
)
from edgellm.types import DeviceId

Applied: TypeAlias = tuple[ClusterState, tuple[Effect, ...]]
NOT_MET = "not met since this device started"
_THERE = (MemberState.ALIVE, MemberState.SUSPECTED)


def apply(state: ClusterState, event: Event, now: float) -> Applied:
    """The state after ``event``, and what is to be done about it, in this order."""
    match event:
        case Tick():
            return _tick(state, event, now)
        case SessionOpened():
            return _opened(state, event, now)
        case Expected():
            return _expected(state, event, now)
        case _:
            member = state.members.get(event.device_id)
            return (state, ()) if member is None else _of_member(state, member, event, now)


def next_tick(state: ClusterState, now: float) -> float:
    """When the next ``Tick`` is due, after one at ``now``."""
    latest = now + state.policy.tick_s
    deadlines = (_deadline(state, member) for member in state.members.values())
    return min((at for at in deadlines if now < at < latest), default=latest)


def _deadline(state: ClusterState, member: Member) -> float:
    """When silence will make another state of this one."""
    if member.state is MemberState.ALIVE:
        return silent_since(state, member) + state.policy.suspect_after_s
    if member.state is MemberState.SUSPECTED:
        return dead_at(state, member)
    return FOREVER


# --- time -------------------------------------------------------------------------------


def _tick(state: ClusterState, tick: Tick, now: float) -> Applied:
    if now - tick.due > state.policy.max_lag_s:
        # We did not run when we should have; what others sent meanwhile may lie unread.
        return replace(state, anew=now), ()
    effects: list[Effect] = []
    for member in list(state.members.values()):
        if now >= _deadline(state, member):
            state, caused = _overdue(state, member, now)
            effects += caused
    for member in list(state.members.values()):
        if _wants_probe(state, member, now):
            helpers = _helpers(state, member)
            if helpers:
                effects.append(AskPeers(member.device_id, helpers))
                state = _with(state, replace(member, asked=now))
    return state, tuple(effects)


def _overdue(state: ClusterState, member: Member, now: float) -> Applied:
    quiet = f"silent for {now - silent_since(state, member):.0f} s"
    match member.state:
        case MemberState.ALIVE:
            problem = member.problem if member.leaving else quiet
            silent = replace(member, state=MemberState.SUSPECTED, since=now, problem=problem)
            return _with(state, silent), (MemberChanged(silent, member.state),)
        case MemberState.SUSPECTED:
            return _bury(state, member, member.problem if member.leaving else quiet, now)
        case _:
            return state, ()


def _wants_probe(state: ClusterState, member: Member, now: float) -> bool:
    return (
        member.state is MemberState.SUSPECTED
        and not member.leaving
        and now >= silent_since(state, member) + state.policy.suspect_after_s
        and now >= member.asked + state.policy.probe_every_s
    )


def _helpers(state: ClusterState, member: Member) -> tuple[DeviceId, ...]:
    """Who to ask about it: whoever we heard of last."""
    others = [
        each
        for each in state.members.values()
        if each.state is MemberState.ALIVE and each.sessions and each is not member
    ]
    others.sort(key=lambda each: (-each.heard, each.device_id))
    return tuple(each.device_id for each in others[: state.policy.helpers])


def _bury(state: ClusterState, member: Member, problem: str, now: float) -> Applied:
    """Nobody is to wait for it any more. Its connections end: if it was only stopped, what it says
    when it goes on was meant for a cluster that is no more."""
    state_now = MemberState.LEFT if member.leaving else MemberState.GONE
    buried = replace(
        member, state=state_now, since=now, sessions=frozenset(), problem=problem[:MAX_PROBLEM]
    )
    effects: tuple[Effect, ...] = (
        MemberChanged(buried, member.state),
        *map(CloseSession, sorted(member.sessions)),
    )
    return _with(state, buried), effects


# --- who comes --------------------------------------------------------------------------


def _expected(state: ClusterState, event: Expected, now: float) -> Applied:
    known = state.members.get(event.device_id)
    if known is not None:
        if known.boot:
            return state, ()  # its own greeting says best what it is called
        return _with(state, replace(known, name=event.name)), ()
    member = replace(_newcomer(state, event.device_id, now), name=event.name, problem=NOT_MET)
    return _added(state, member), ()


def _opened(state: ClusterState, event: SessionOpened, now: float) -> Applied:
    known = state.members.get(event.device_id)
    member = known or _newcomer(state, event.device_id, now)
    if event.boot < member.boot:
        return _refused(state, member, event)
    newer = event.boot > member.boot
    leaving = member.leaving and not newer
    older = sorted(member.sessions) if newer else []
    back = newer or member.state not in _THERE or not member.sessions
    met = replace(
        member,
        name=event.name,
        boot=event.boot,
        sessions=(frozenset() if newer else member.sessions) | {event.session},
        heard=now,
        heard_elsewhere=NEVER,
        asked=NEVER,
        leaving=leaving,
        problem=member.problem if leaving else "",
        state=MemberState.ALIVE,
        since=now if newer or member.state is not MemberState.ALIVE else member.since,
    )
    effects: list[Effect] = [CloseSession(session) for session in older]
    if known is None or newer or member.state is not MemberState.ALIVE:
        effects.append(MemberChanged(met, None if known is None else member.state))
    if back:
        effects.append(DialSoon(event.device_id))
    return _added(state, met), tuple(effects)


def _refused(state: ClusterState, member: Member, event: SessionOpened) -> Applied:
    """A run that is older than one we met is over, or a copy: it takes nobody's place."""
    closed = CloseSession(event.session)
    if event.boot <= member.refused:
        return state, (closed,)
    refused = replace(member, refused=event.boot)
    return _with(state, refused), (closed, RunRefused(refused, event.boot))


def _newcomer(state: ClusterState, device_id: DeviceId, now: float) -> Member:
    return Member(device_id, "", MemberState.GONE, now, state.policy.dead_after_s)


# --- what happens to a member -----------------------------------------------------------


def _of_member(
    state: ClusterState,
    member: Member,
    event: SessionClosed
    | Heard
    | DialFailed
    | ProbeAnswered
    | GoodbyeSaid
    | InBackground
    | Forgotten,
    now: float,
) -> Applied:
    match event:
        case Heard(at=at):
            return _heard(state, member, at, now)
        case SessionClosed(session=session, reason=reason):
            return _closed(state, member, session, reason, now)
        case DialFailed(problem=problem):
            return _dial_failed(state, member, problem, now)
        case ProbeAnswered(by=by, silent_s=silent_s):
            return _answered(state, member, by, now - max(0.0, silent_s), now)
        case GoodbyeSaid(reason=reason):
            leaving = replace(member, leaving=True, problem=reason[:MAX_PROBLEM])
            rarely = DialRarely(member.device_id, reason)
            if member.sessions or member.state not in _THERE:
                return _with(state, leaving), (rarely,)
            state, effects = _bury(state, leaving, leaving.problem, now)
            return state, (*effects, rarely)
        case InBackground(background=background):
            policy = state.policy
            patience = policy.background_dead_after_s if background else policy.dead_after_s
            return _with(state, replace(member, dead_after_s=patience)), ()
        case Forgotten():
            rest = {key: each for key, each in state.members.items() if each is not member}
            closed = tuple(map(CloseSession, sorted(member.sessions)))
            return replace(state, members=MappingProxyType(rest)), closed


def _heard(state: ClusterState, member: Member, at: float, now: float) -> Applied:
    """A sign of life counts only where there is a connection for it to have come by."""
    if at <= member.heard or not member.sessions:
        return state, ()
    met = replace(member, heard=at)
    if member.state is MemberState.ALIVE or now >= at + state.policy.suspect_after_s:
        return _with(state, met), ()
    met = replace(
        met,
        state=MemberState.ALIVE,
        since=now,
        problem=met.problem if met.leaving else "",
        heard_elsewhere=NEVER,
        asked=NEVER,
    )
    return _with(state, met), (MemberChanged(met, member.state),)


def _closed(state: ClusterState, member: Member, session: int, reason: str, now: float) -> Applied:
    if session not in member.sessions:
        return state, ()
    left = replace(member, sessions=member.sessions - {session})
    if left.sessions:
        return _with(state, left), ()
    if left.leaving:
        return _bury(state, left, left.problem, now)
    left = replace(left, state=MemberState.SUSPECTED, problem=reason[:MAX_PROBLEM])
    soon = DialSoon(member.device_id)
    if member.state is MemberState.SUSPECTED:
        return _with(state, left), (soon,)
    left = replace(left, since=now)
    return _with(state, left), (MemberChanged(left, member.state), soon)


def _dial_failed(state: ClusterState, member: Member, problem: str, now: float) -> Applied:
    """Not connected, and not to be connected to: it is gone, unless there is reason to think that
    it is only us, or that it sleeps for a while."""
    patient = member.dead_after_s > state.policy.dead_after_s
    heard_by_others = now < member.heard_elsewhere + member.dead_after_s
    if member.state is not MemberState.SUSPECTED or member.sessions or patient or heard_by_others:
        return state, ()
    return _bury(state, member, problem, now)


def _answered(state: ClusterState, member: Member, by: str, heard_at: float, now: float) -> Applied:
    if member.state is not MemberState.SUSPECTED:
        return state, ()
    told = replace(member, heard_elsewhere=max(member.heard_elsewhere, heard_at))
    # What others heard before it fell silent here says only that they listened as well as we.
    if heard_at > silent_since(state, member) + state.policy.suspect_after_s / 2:
        told = replace(told, problem=f"cannot be reached from here; {by} hears it"[:MAX_PROBLEM])
    return _with(state, told), ()


# --- the table --------------------------------------------------------------------------


def _with(state: ClusterState, *changed: Member) -> ClusterState:
    members = {**state.members, **{each.device_id: each for each in changed}}
    return replace(state, members=MappingProxyType(members))


def _added(state: ClusterState, member: Member) -> ClusterState:
    """With a member that may be new. Where there is no room, whoever is away for longest goes."""
    if member.device_id not in state.members and len(state.members) >= MAX_MEMBERS:
        away = _longest_away(state.members.values())
        if away is not None:
            rest = {key: each for key, each in state.members.items() if each is not away}
            state = replace(state, members=MappingProxyType(rest))
    return _with(state, member)


def _longest_away(members: Iterable[Member]) -> Member | None:
    away = [each for each in members if each.state not in _THERE]
    return min(away, key=lambda each: each.since, default=None)
