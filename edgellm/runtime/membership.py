"""Who of the cluster is there: carries out what ``cluster.apply`` decides, over a node's sessions.

It decides nothing. Every session with a node, whoever dialed it, is told to ``opened``; their
heartbeats are the pings of ``wire.connection``. Commands (``boot`` 0) come and go unnoticed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from edgellm.cluster import (
    AskPeers,
    CloseSession,
    ClusterState,
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
    Member,
    MemberChanged,
    MemberState,
    Policy,
    ProbeAnswered,
    RunRefused,
    SessionClosed,
    SessionOpened,
    Tick,
    apply,
    facts,
    next_tick,
    silent_s,
)
from edgellm.errors import PeerLostError
from edgellm.runtime.session import Introduction, Session
from edgellm.types import DeviceId
from edgellm.wire.messages import DeviceInfo, Message
from edgellm.wire.trust import Goodbye, MembersSeen, PeerProbed, ProbePeer, QueryMembers

UNWATCHED = Policy(
    tick_s=1e8, suspect_after_s=1e8, dead_after_s=2e8, background_dead_after_s=2e8, max_lag_s=1e8
)
"""Only to measure what heartbeats cost: without them nobody may be accused of silence."""
NEVER_S = 1e9
"""What an asked device says of one that it never heard of."""
BACKGROUND = "background"
"""A figure of ``DeviceInfo``: 1 where the device's system lets it run now and then only."""
MAX_SHOWN = 128
"""Members in one answer, those that are there first: it has to fit into a control frame."""
MAX_ASKED = 64
"""Questions about silent devices that are open at once; the oldest is given up for another."""

OnChange = Callable[[Member, MemberState | None], None]
"""Hears of a member in its new state, and of its former one (None: it was not known)."""


class Dialer(Protocol):
    """Who connects to devices: ``runtime.neighbours``."""

    def soon(self, device_id: str) -> None:
        """Try it now, if it is known where."""

    def leaving(self, device_id: str, reason: str) -> None:
        """Try it rarely, once its connection ends."""

    def strangers(self) -> tuple[dict[str, Any], ...]:
        """Devices that announce themselves and are not paired with us: ``device_id``, ``name``,
        ``state`` (``unpaired``) and ``address``."""


class Membership:
    """See the module. One a node; it listens from the moment it is made until closed."""

    def __init__(
        self,
        me: Introduction,
        dialer: Dialer,
        *,
        policy: Policy | None = None,
        on_change: OnChange = lambda member, before: None,
        on_notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``on_notice`` takes a line for people where neither ``Found`` nor ``Lost`` says it."""
        self._me = me
        self._dialer = dialer
        self._on_change = on_change
        self._on_notice = on_notice
        self._state = ClusterState(policy or Policy())
        self._sessions: dict[int, Session] = {}
        self._numbers = itertools.count(1)
        self._requests = itertools.count(1)
        self._asked: dict[int, tuple[str, DeviceId]] = {}
        self._silent: set[DeviceId] = set()
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._closed = False
        self._timer = self._loop.call_soon(self._tick, self._began)

    # --- for others -------------------------------------------------------------------

    def seen(self) -> tuple[dict[str, Any], ...]:
        """This device and the others as it sees them, each as plain data: ``cluster.facts``."""
        now = self._loop.time()
        ours = Member(
            DeviceId(self._me.device_id),
            self._me.name,
            MemberState.ALIVE,
            self._began,
            self._state.policy.dead_after_s,
            self._me.boot,
            heard=now,
        )
        rank = list(MemberState)
        others = sorted(self._state.members.values(), key=lambda each: rank.index(each.state))
        return tuple(facts(member, now) for member in [ours, *others][:MAX_SHOWN])

    def state_of(self, device_id: str) -> MemberState | None:
        """None for a device that does not belong to us, as far as we know."""
        member = self._state.members.get(DeviceId(device_id))
        return None if member is None else member.state

    def belong(self, devices: Iterable[tuple[str, str]]) -> None:
        """These devices, by id and name, belong to the cluster, there or not, and no others: who
        does no more is hung up, and not listed any longer."""
        names = {DeviceId(device_id): name for device_id, name in devices}
        for device_id, name in names.items():
            if device_id != self._me.device_id:
                self._feed(Expected(device_id, name))
        for device_id in [each for each in self._state.members if each not in names]:
            self._feed(Forgotten(device_id))

    def opened(self, session: Session) -> None:
        """A peer greeted, on a connection that either side dialed. It may be hung up at once."""
        peer = session.peer
        if self._closed or not peer.boot or peer.device_id == self._me.device_id:
            return
        number, device_id = next(self._numbers), DeviceId(peer.device_id)
        self._sessions[number] = session
        known = self._state.members.get(device_id)
        if known is not None and known.dead_after_s > self._state.policy.dead_after_s:
            session.allow_silence(known.dead_after_s)

        def ended(reason: str) -> None:
            del self._sessions[number]
            self._feed(SessionClosed(device_id, number, reason))

        session.on_close(ended)
        self._feed(SessionOpened(device_id, peer.name, peer.boot, number))

    def failed(self, device_id: str, problem: str) -> None:
        """A device was tried at all its addresses, and nobody was there."""
        self._feed(DialFailed(DeviceId(device_id), problem))

    def take(self, session: Session, message: Message) -> bool:
        """Take a message, if it is for us."""
        now = self._loop.time()
        device_id = DeviceId(session.peer.device_id)
        if isinstance(message, QueryMembers):
            session.send(MembersSeen((*self.seen(), *self._dialer.strangers())[:MAX_SHOWN]))
        elif isinstance(message, ProbePeer):
            self._listen()  # the last tick may be half a second ago
            about = self._state.members.get(DeviceId(message.device_id))
            session.send(PeerProbed(message.request, silent_s(about, now, NEVER_S)))
        elif isinstance(message, PeerProbed):
            helper, silent = self._asked.pop(message.request, ("", DeviceId("")))
            if helper == device_id:
                self._feed(ProbeAnswered(silent, session.peer.name, message.silent_s))
        elif isinstance(message, Goodbye):
            if session.peer.boot:
                self._feed(GoodbyeSaid(device_id, message.reason))
        elif isinstance(message, DeviceInfo):  # unasked: something about it changed
            self._patient_with(device_id, bool(message.figures.get(BACKGROUND)))
        else:
            return False
        return True

    def goodbye(self, reason: str) -> None:
        """Tell all nodes that this one ends now, on purpose."""
        for session in list(self._sessions.values()):
            session.send(Goodbye(reason, 0.0))

    def close(self) -> None:
        """Listen to nobody any more."""
        self._closed = True
        self._timer.cancel()

    # --- events and effects -----------------------------------------------------------

    def _tick(self, due: float) -> None:
        self._listen()
        self._feed(Tick(due))
        after = next_tick(self._state, self._loop.time())
        self._timer = self._loop.call_at(after, self._tick, after)

    def _listen(self) -> None:
        """Take note of whoever was heard since the last time."""
        latest: dict[DeviceId, float] = {}
        for session in self._sessions.values():
            device_id = DeviceId(session.peer.device_id)
            latest[device_id] = max(session.heard_at, latest.get(device_id, session.heard_at))
        for device_id, at in latest.items():
            self._feed(Heard(device_id, at))

    def _patient_with(self, device_id: DeviceId, background: bool) -> None:
        self._feed(InBackground(device_id, background))
        member = self._state.members.get(device_id)
        for session in list(self._sessions.values()):
            if member is not None and session.peer.device_id == device_id:
                session.allow_silence(member.dead_after_s)

    def _feed(self, event: Event) -> None:
        if self._closed:
            return
        self._state, effects = apply(self._state, event, self._loop.time())
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case CloseSession(session=number):
                session = self._sessions.get(number)
                if session is not None:
                    session.end(PeerLostError(self._why_closed(session)))
            case AskPeers(device_id=device_id, helpers=helpers):
                for helper in helpers:
                    self._ask(helper, device_id)
            case DialSoon(device_id=device_id):
                self._dialer.soon(device_id)
            case DialRarely(device_id=device_id, reason=reason):
                self._dialer.leaving(device_id, reason)
            case MemberChanged(member=member, before=before):
                self._on_change(member, before)
                self._tell(member)
            case RunRefused(member=member, boot=boot):
                self._on_notice(
                    f"Refused an older run of device {member.name}, or a copy of it: it says that"
                    f" it started {boot} times; {member.name} has started {member.boot} times."
                )

    def _tell(self, member: Member) -> None:
        """Say what ``Found`` and ``Lost`` of neighbours do not: silence while connected."""
        if member.state is MemberState.SUSPECTED and member.sessions:
            self._silent.add(member.device_id)
            self._on_notice(f"Device {member.name} does not answer: {member.problem}.")
        elif member.device_id in self._silent:
            self._silent.discard(member.device_id)
            if member.state is MemberState.ALIVE:
                self._on_notice(f"Device {member.name} answers again.")

    def _why_closed(self, session: Session) -> str:
        member = self._state.members.get(DeviceId(session.peer.device_id))
        if member is None:
            return "the device was forgotten."
        if session.peer.boot != member.boot:
            return "it is not the newest run of the device."
        return f"the device was {member.problem or 'given up'}."

    def _session_with(self, device_id: DeviceId) -> Session | None:
        """An open one."""
        member = self._state.members.get(device_id)
        numbers = sorted(member.sessions) if member is not None else []
        return next((self._sessions[each] for each in numbers if each in self._sessions), None)

    def _ask(self, helper: DeviceId, device_id: DeviceId) -> None:
        session = self._session_with(helper)
        if session is None:
            return
        while len(self._asked) >= MAX_ASKED:
            del self._asked[next(iter(self._asked))]
        request = next(self._requests)
        self._asked[request] = (helper, device_id)
        session.send(ProbePeer(request, device_id))
