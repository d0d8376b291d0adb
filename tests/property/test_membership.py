"""Whatever happens, in whatever order: nobody is buried alive, and no ghost takes a place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgellm import cluster as c
from edgellm.types import DeviceId

pytestmark = pytest.mark.pure

IDS = [DeviceId(each * 64) for each in "abcd"]
POLICY = c.Policy()
DEVICES = st.sampled_from(IDS)
THERE = (c.MemberState.ALIVE, c.MemberState.SUSPECTED)


class AnyHistory(RuleBasedStateMachine):
    """Beside the state under test it keeps what an honest witness would: when we last had reason
    to think that a device is there, and what was told of it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = c.ClusterState()
        self.now = 0.0
        self.due = 0.0
        self.sessions = 0
        self.open: dict[int, DeviceId] = {}
        self.sign: dict[DeviceId, float] = {}
        self.listening_since = 0.0
        self.boots: dict[DeviceId, int] = {}
        self.goodbyes: set[DeviceId] = set()

    def happens(self, event: c.Event) -> tuple[c.Effect, ...]:
        before = self.state
        self.state, effects = c.apply(before, event, self.now)
        for effect in effects:
            if isinstance(effect, c.CloseSession):
                self.open.pop(effect.session, None)
            if isinstance(effect, c.MemberChanged):
                self._check_change(effect, event)
        assert c.apply(before, event, self.now) == (self.state, effects)
        return effects

    def _check_change(self, change: c.MemberChanged, cause: c.Event) -> None:
        device, now = change.member.device_id, self.now
        silent = now - max(self.sign.get(device, 0.0), self.listening_since)
        if change.member.state is c.MemberState.SUSPECTED:
            assert isinstance(cause, c.SessionClosed) or silent >= POLICY.suspect_after_s - 1e-6
        if change.member.state is c.MemberState.GONE:
            unreachable = isinstance(cause, c.DialFailed) and device not in self.open.values()
            assert unreachable or silent >= POLICY.dead_after_s - 1e-6
        if change.member.state is c.MemberState.LEFT:
            assert device in self.goodbyes

    @rule(device=DEVICES, boot=st.integers(1, 4))
    def opened(self, device: DeviceId, boot: int) -> None:
        self.sessions += 1
        self.open[self.sessions] = device
        newest = boot >= self.boots.get(device, 0)
        if newest:
            self.sign[device] = self.now
            if boot > self.boots.get(device, 0):
                self.goodbyes.discard(device)
        effects = self.happens(c.SessionOpened(device, device[0], boot, self.sessions))
        assert (c.CloseSession(self.sessions) in effects) is not newest
        self.boots[device] = max(boot, self.boots.get(device, 0))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def closed(self, data: Any) -> None:
        session = data.draw(st.sampled_from(sorted(self.open)))
        self.happens(c.SessionClosed(self.open.pop(session), session, "closed"))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def heard(self, data: Any) -> None:
        device = self.open[data.draw(st.sampled_from(sorted(self.open)))]
        self.sign[device] = self.now
        self.happens(c.Heard(device, self.now))

    @rule(device=DEVICES)
    def dial_failed(self, device: DeviceId) -> None:
        self.happens(c.DialFailed(device, "connection refused"))

    @rule(device=DEVICES, silent_s=st.floats(0.0, 10.0))
    def answered(self, device: DeviceId, silent_s: float) -> None:
        self.happens(c.ProbeAnswered(device, "x", silent_s))

    @rule(device=DEVICES)
    def goodbye(self, device: DeviceId) -> None:
        if device in self.state.members:
            self.goodbyes.add(device)
        self.happens(c.GoodbyeSaid(device, "stopped"))

    @rule(device=DEVICES, gone=st.booleans())
    def forgotten_or_expected(self, device: DeviceId, gone: bool) -> None:
        if not gone:
            self.happens(c.Expected(device, "x"))
            return
        self.happens(c.Forgotten(device))
        self.boots.pop(device, None)
        self.goodbyes.discard(device)

    @rule(seconds=st.floats(0.01, 3.0))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            due = c.next_tick(self.state, self.now)
            assert self.now < due <= self.now + POLICY.tick_s
            self.now = due
            self.happens(c.Tick(due))

    @rule(lag=st.floats(0.51, 100.0))
    def we_are_stopped(self, lag: float) -> None:
        due = c.next_tick(self.state, self.now)
        self.now = due + lag
        self.listening_since = self.now
        assert self.happens(c.Tick(due)) == ()  # nobody is accused for what we missed

    @invariant()
    def it_adds_up(self) -> None:
        for member in self.state.members.values():
            assert member.boot == self.boots.get(member.device_id, 0)  # they never go back
            assert member.since <= self.now
            of_it = {session for session, who in self.open.items() if who == member.device_id}
            assert member.sessions == of_it
            if member.sessions:
                assert member.state in THERE
            if member.state is c.MemberState.ALIVE:
                assert member.sessions
        assert set(self.open.values()) <= set(self.state.members)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
