"""Who is there: every decision, on a clock that the test turns."""

from __future__ import annotations

import pytest

from edgellm import cluster as c
from edgellm.cluster.state import MAX_MEMBERS
from edgellm.types import DeviceId

pytestmark = pytest.mark.pure

A, B, C, D = (DeviceId(each * 64) for each in "abcd")
POLICY = c.Policy()


class Seen:
    """A cluster as one device sees it. Devices are called by the first letters of their ids."""

    def __init__(self) -> None:
        self.state = c.ClusterState()
        self.now = 100.0
        self.effects: list[c.Effect] = []
        self._due = self.now

    def happens(self, *events: c.Event) -> list[c.Effect]:
        """What is to be done about them, now."""
        made: list[c.Effect] = []
        for event in events:
            self.state, effects = c.apply(self.state, event, self.now)
            made += effects
        self.effects += made
        return made

    def opens(self, device: DeviceId, session: int, boot: int = 1) -> list[c.Effect]:
        return self.happens(c.SessionOpened(device, device[0], boot, session))

    def passes(self, seconds: float, *alive: DeviceId) -> list[c.Effect]:
        """Time in which we run as we should, and hear these devices all the time."""
        made: list[c.Effect] = []
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, c.next_tick(self.state, self.now))
            made += self.happens(*(c.Heard(device, self.now) for device in alive))
            made += self.happens(c.Tick(self.now))
        return made

    def sleeps(self, seconds: float) -> list[c.Effect]:
        """Time in which we do not run at all."""
        due = c.next_tick(self.state, self.now)
        self.now += seconds
        return self.happens(c.Tick(due))

    def __getitem__(self, device: DeviceId) -> c.Member:
        return self.state.members[device]

    def states(self) -> dict[str, str]:
        return {each.name: each.state.value for each in self.state.members.values()}


def changes(effects: list[c.Effect]) -> list[tuple[str, str]]:
    return [
        (e.member.name, e.member.state.value) for e in effects if isinstance(e, c.MemberChanged)
    ]


@pytest.fixture
def seen() -> Seen:
    """A is connected by session 1, B by session 2, C by session 3."""
    made = Seen()
    for session, device in enumerate((A, B, C), 1):
        made.opens(device, session)
    return made


def test_who_greets_is_there_and_is_dialed_back() -> None:
    seen = Seen()
    effects = seen.opens(A, 1)
    assert changes(effects) == [("a", "alive")]
    assert effects[-1] == c.DialSoon(A)
    assert seen.opens(A, 2) == []  # the way back
    assert seen[A].sessions == {1, 2}


def test_heartbeats_keep_everyone_alive(seen: Seen) -> None:
    assert seen.passes(60.0, A, B, C) == []
    assert seen.states() == {"a": "alive", "b": "alive", "c": "alive"}


def test_silence_is_suspected_after_two_seconds_and_final_after_five(seen: Seen) -> None:
    assert changes(seen.passes(1.9, B, C)) == []
    effects = seen.passes(0.1, B, C)
    assert changes(effects) == [("a", "suspected")]
    assert effects[-1] == c.AskPeers(A, (B, C))
    assert seen[A].problem == "silent for 2 s"
    assert changes(seen.passes(2.9, B, C)) == []
    effects = seen.passes(0.1, B, C)
    assert changes(effects) == [("a", "gone")]
    assert effects[-1] == c.CloseSession(1)
    assert (seen[A].problem, seen[A].since) == ("silent for 5 s", 105.0)
    assert changes(seen.passes(60.0, B, C)) == []


def test_one_sign_of_life_clears_a_suspicion(seen: Seen) -> None:
    seen.passes(4.9, B, C)
    assert changes(seen.passes(0.05, A, B, C)) == [("a", "alive")]
    assert (seen[A].problem, seen[A].since) == ("", seen.now)
    assert changes(seen.passes(4.0, B, C)) == [("a", "suspected")]


def test_two_at_most_are_asked_and_only_those_that_are_there() -> None:
    seen = Seen()
    for session, device in enumerate((A, B, C, D), 1):
        seen.opens(device, session)
    asked = [e for e in seen.passes(2.0, B, C, D) if isinstance(e, c.AskPeers)]
    assert [len(each.helpers) for each in asked] == [2]
    lonely = Seen()
    lonely.opens(A, 1)
    lonely.opens(B, 2)
    assert not any(isinstance(e, c.AskPeers) for e in lonely.passes(10.0))


def test_who_is_heard_elsewhere_is_not_gone_but_out_of_our_reach(seen: Seen) -> None:
    for _ in range(20):
        for effect in seen.passes(1.0, B, C):
            if isinstance(effect, c.AskPeers):
                seen.happens(c.ProbeAnswered(A, "b", 0.2))
    assert seen[A].state is c.MemberState.SUSPECTED
    assert seen[A].problem == "cannot be reached from here; b hears it"
    # Nor is it gone because a dial of ours fails.
    seen.happens(c.SessionClosed(A, 1, "the peer was silent for 5.0 s"))
    assert changes(seen.happens(c.DialFailed(A, "no route"))) == []
    # But it is as soon as the others hear it no more either.
    assert changes(seen.passes(6.0, B, C)) == [("a", "gone")]


def test_others_who_hear_nothing_either_delay_nothing(seen: Seen) -> None:
    seen.passes(2.0, B, C)
    seen.happens(c.ProbeAnswered(A, "b", 1.8))
    assert seen[A].problem == "silent for 2 s"
    assert changes(seen.passes(3.3, B, C)) == [("a", "gone")]


def test_who_was_stopped_itself_accuses_nobody_and_counts_anew(seen: Seen) -> None:
    assert seen.sleeps(60.0) == []
    assert changes(seen.passes(1.9)) == []
    assert {name for name, _ in changes(seen.passes(0.1))} == {"a", "b", "c"}
    assert seen.sleeps(10.0) == []
    assert changes(seen.passes(4.9)) == []
    assert {state for _, state in changes(seen.passes(0.1))} == {"gone"}


def test_a_little_lag_is_none_of_their_business(seen: Seen) -> None:
    seen.passes(4.6)
    due = c.next_tick(seen.state, seen.now)
    seen.now = due + POLICY.max_lag_s - 0.01
    assert set(changes(seen.happens(c.Tick(due)))) == {("a", "gone"), ("b", "gone"), ("c", "gone")}


def test_a_killed_process_is_gone_once_a_dial_finds_nobody(seen: Seen) -> None:
    effects = seen.happens(c.SessionClosed(A, 1, "the peer closed the connection"))
    assert changes(effects) == [("a", "suspected")]
    assert effects[-1] == c.DialSoon(A)
    assert seen[A].problem == "the peer closed the connection"
    refused = "cannot connect to 10.0.0.1:1: connection refused"
    assert changes(seen.happens(c.DialFailed(A, refused))) == [("a", "gone")]
    assert seen[A].problem == refused
    assert changes(seen.opens(A, 4, boot=2)) == [("a", "alive")]


def test_a_failed_dial_says_nothing_about_who_is_connected(seen: Seen) -> None:
    assert seen.happens(c.DialFailed(A, "connection refused")) == []
    seen.passes(3.0, B, C)
    assert seen.happens(c.DialFailed(A, "connection refused")) == []
    assert seen[A].state is c.MemberState.SUSPECTED


def test_one_of_two_connections_may_end(seen: Seen) -> None:
    seen.opens(A, 4)
    assert seen.happens(c.SessionClosed(A, 1, "the peer closed the connection")) == []
    assert seen[A].state is c.MemberState.ALIVE
    assert seen.happens(c.SessionClosed(A, 1, "again")) == []


def test_a_newer_run_takes_the_place_of_an_older_one(seen: Seen) -> None:
    seen.passes(10.0, A, B, C)
    effects = seen.opens(A, 4, boot=2)
    assert effects[0] == c.CloseSession(1)
    assert changes(effects) == [("a", "alive")]
    assert seen[A].sessions == {4}
    assert (seen[A].boot, seen[A].since) == (2, seen.now)
    assert seen.happens(c.SessionClosed(A, 1, "closed")) == []


def test_an_older_run_is_refused_and_that_is_said_once(seen: Seen) -> None:
    seen.opens(A, 4, boot=5)
    refused = seen.opens(A, 5, boot=3)
    assert refused == [c.CloseSession(5), c.RunRefused(seen[A], 3)]
    assert seen.opens(A, 6, boot=3) == [c.CloseSession(6)]
    assert seen[A].sessions == {4}
    assert seen[A].boot == 5
    seen.happens(c.SessionClosed(A, 4, "x"), c.DialFailed(A, "x"))
    seen.opens(A, 7, boot=4)
    assert seen[A].state is c.MemberState.GONE  # its ghost does not bring it back


def test_who_says_goodbye_has_left_when_its_connections_end(seen: Seen) -> None:
    effects = seen.happens(c.GoodbyeSaid(A, "it was stopped"))
    assert effects == [c.DialRarely(A, "it was stopped")]
    assert seen[A].state is c.MemberState.ALIVE  # it still hands over what it holds
    effects = seen.happens(c.SessionClosed(A, 1, "the peer closed the connection"))
    assert changes(effects) == [("a", "left")]
    assert not any(isinstance(effect, c.DialSoon) for effect in effects)
    assert seen[A].problem == "it was stopped"
    assert changes(seen.happens(c.DialFailed(A, "connection refused"))) == []
    assert changes(seen.opens(A, 4, boot=2)) == [("a", "alive")]
    assert not seen[A].leaving


def test_who_says_goodbye_and_then_nothing_has_left_too(seen: Seen) -> None:
    seen.happens(c.GoodbyeSaid(A, "it was stopped"))
    assert changes(seen.passes(5.0, B, C)) == [("a", "suspected"), ("a", "left")]
    seen.happens(c.SessionClosed(B, 2, "the peer closed the connection"))
    assert changes(seen.happens(c.GoodbyeSaid(B, "late"))) == [("b", "left")]


def test_a_phone_in_the_background_has_more_time(seen: Seen) -> None:
    seen.happens(c.InBackground(A, True))
    assert changes(seen.passes(14.9, B, C)) == [("a", "suspected")]
    seen.happens(c.SessionClosed(A, 1, "closed"))
    assert changes(seen.happens(c.DialFailed(A, "connection refused"))) == []
    assert changes(seen.passes(0.1, B, C)) == [("a", "gone")]
    seen.opens(A, 4)
    seen.happens(c.InBackground(A, False))
    assert changes(seen.passes(5.0, B, C)) == [("a", "suspected"), ("a", "gone")]


def test_who_was_never_met_is_listed_and_who_is_forgotten_is_not(seen: Seen) -> None:
    seen.happens(c.Expected(D, "attic"), c.Expected(A, "another name"))
    assert (seen[D].name, seen[D].state) == ("attic", c.MemberState.GONE)
    assert seen[A].name == "a"
    assert changes(seen.opens(D, 4)) == [("d", "alive")]
    assert seen.happens(c.Forgotten(D)) == [c.CloseSession(4)]
    assert D not in seen.state.members
    assert seen.happens(c.SessionClosed(D, 4, "closed"), c.Heard(D, seen.now)) == []


def test_what_is_told_of_members(seen: Seen) -> None:
    seen.happens(c.Expected(D, "attic"))
    seen.passes(1.0, A)
    told = {each.name: c.facts(each, seen.now) for each in seen.state.members.values()}
    assert told["a"] == {
        "device_id": A, "name": "a", "state": "alive", "since_s": 1.0, "silent_s": 0.0, "boot": 1,
        "problem": "",
    }  # fmt: skip
    assert told["b"]["silent_s"] == 1.0
    assert told["attic"]["silent_s"] is None
    assert c.silent_s(seen[D], seen.now, 1e9) == c.silent_s(None, seen.now, 1e9) == 1e9


def test_a_flood_of_devices_pushes_out_nobody_who_is_there(seen: Seen) -> None:
    for number in range(2 * MAX_MEMBERS):
        seen.now += 1.0
        seen.happens(c.Expected(DeviceId(f"{number:064x}"), "x"))
    assert len(seen.state.members) == MAX_MEMBERS
    assert {A, B, C} <= set(seen.state.members)
