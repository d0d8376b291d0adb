"""Whom to try when: decisions without effects, on a clock that the test turns."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.discovery.base import MAX_ADDRESSES, MAX_DEVICES, How, Sighting, sighting_from
from edgellm.discovery.directory import (
    FIRST_RETRY_S,
    LAST_RETRY_S,
    MAX_TARGETS,
    STEADY_S,
    Attempt,
    Directory,
    State,
    Verdict,
    retry_after,
)

pytestmark = pytest.mark.pure

ME, A, B = "0" * 64, "a" * 64, "b" * 64
AT_A, AT_B = ("10.0.0.1", 1), ("10.0.0.2", 2)


def directory() -> Directory:
    return Directory(ME, lambda: 0.0)


def sighting(device: str = A, *addresses: tuple[str, int], how: How = How.MDNS) -> Sighting:
    return Sighting(device, "x", addresses or (AT_A,), how)


def reached(of: Directory, device: str = A, at: tuple[str, int] = AT_A, now: float = 0.0) -> None:
    (attempt,) = of.due(now)
    assert of.reached(attempt, device, "x", at, now) is Verdict.NEW


def test_who_is_seen_is_tried_at_once_and_only_once_at_a_time() -> None:
    of = directory()
    of.saw(sighting(), 0.0)
    assert of.next_due() == 0.0
    assert of.due(0.0) == [Attempt(A, (AT_A,))]
    of.saw(sighting(A, AT_B), 0.1)
    assert of.due(100.0) == []
    assert of.next_due() is None


def test_we_are_not_our_own_neighbour() -> None:
    of = directory()
    of.saw(sighting(ME), 0.0)
    assert of.devices() == ()


def test_retries_are_ever_rarer_up_to_half_a_minute() -> None:
    of, now, gaps = directory(), 0.0, []
    of.saw(sighting(), now)
    for _ in range(10):
        (attempt,) = of.due(now)
        of.failed(attempt, now)
        due = of.next_due()
        assert due is not None
        assert of.due(due - 0.01) == []
        gaps.append(due - now)
        now = due
    assert gaps == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]


@given(st.integers(0, 10**9), st.floats(0, 1, exclude_max=True))
def test_chance_shortens_a_wait_by_half_at_most(tries: int, chance: float) -> None:
    assert FIRST_RETRY_S / 2 <= retry_after(tries, chance) <= LAST_RETRY_S
    assert retry_after(tries, 0.0) / 2 <= retry_after(tries, chance) <= retry_after(tries, 0.0)


def test_a_new_address_is_tried_soon_but_not_all_the_time() -> None:
    of = directory()
    of.saw(sighting(), 0.0)
    for _ in range(8):
        (attempt,) = of.due(of.next_due() or 0.0)
        of.failed(attempt, 1000.0)
    assert (of.next_due() or 0) - 1000.0 > 10
    for port in range(100):
        of.saw(sighting(A, ("10.0.0.9", port + 1)), 1000.0)
    assert of.next_due() == 1000.0 + FIRST_RETRY_S
    (attempt,) = of.due(1000.5)
    assert attempt.addresses[0] == ("10.0.0.9", 100)
    assert len(attempt.addresses) == MAX_ADDRESSES


def test_a_reached_device_is_left_alone_until_it_is_lost() -> None:
    of = directory()
    of.saw(sighting(), 0.0)
    reached(of)
    assert (of.due(1e9), of.next_due()) == ([], None)
    of.lost(A, 50.0)
    (device,) = of.devices()
    assert (device.state, device.since, device.at) == (State.LOST, 50.0, AT_A)
    assert of.due(50.0) == [Attempt(A, (AT_A,))]


def test_who_hangs_up_again_and_again_is_tried_ever_more_rarely() -> None:
    of, now, gaps = directory(), 0.0, []
    of.saw(sighting(), now)
    for _ in range(6):
        reached(of, now=now)
        of.lost(A, now + 0.1)
        due = of.next_due()
        assert due is not None
        gaps.append(round(due - now - 0.1, 3))
        now = due
    assert gaps == [0, 1, 2, 4, 8, 16]
    reached(of, now=now)
    of.lost(A, now + STEADY_S)  # a good connection makes good
    assert of.next_due() == now + STEADY_S


def test_who_left_on_purpose_is_tried_rarely_until_there_is_news() -> None:
    of = directory()
    of.saw(Sighting("", "", (AT_A,), How.TOLD), 0.0)
    reached(of)
    of.lost(A, 10.0, on_purpose=True)
    assert of.due(13.9) == []
    assert {each.device_id for each in of.due(14.0)} == {A, ""}
    for attempt in (Attempt(A, (AT_A,)), Attempt("", (AT_A,))):
        of.failed(attempt, 14.0)
    assert of.next_due() == 14.0 + 8.0
    of.soon(A, 15.0)
    of.soon(B, 15.0)  # nobody knows where
    assert of.next_due() == 15.0 + FIRST_RETRY_S
    reached(of, now=16.0)
    of.soon(A, 17.0)
    assert of.next_due() is None


def test_silence_evicts_nobody() -> None:
    of = directory()
    of.saw(sighting(), 0.0)
    reached(of)
    of.lost(A, 1.0)
    now = 1.0
    for _ in range(100):
        for attempt in of.due(now):
            of.failed(attempt, now)
        now = of.next_due() or now
    assert [device.device_id for device in of.devices()] == [A]


def test_a_device_that_answers_elsewhere_is_there_from_now_on() -> None:
    of = directory()
    of.saw(sighting(A, AT_A, AT_B), 0.0)
    reached(of, A, AT_B)
    assert of.devices()[0].at == AT_B
    of.lost(A, 1.0)
    assert of.due(2.0)[0].addresses[0] == AT_B


def test_another_device_at_an_address_is_found_as_who_it_is() -> None:
    of = directory()
    of.saw(sighting(A, AT_A, AT_B), 0.0)
    (attempt,) = of.due(0.0)
    assert of.reached(attempt, B, "b", AT_A, 0.0) is Verdict.OTHER
    by_id = {device.device_id: device.addresses for device in of.devices()}
    assert by_id == {A: (AT_B,), B: (AT_A,)}


def test_a_told_address_is_whoever_is_there() -> None:
    of = directory()
    of.saw(Sighting("", "", (AT_A,), How.TOLD), 0.0)
    (attempt,) = of.due(0.0)
    assert attempt == Attempt("", (AT_A,))
    assert of.reached(attempt, A, "a", AT_A, 0.0) is Verdict.NEW
    assert (of.due(1e9), of.next_due()) == ([], None)
    of.lost(A, 1.0)
    assert {each.device_id for each in of.due(1.0 + FIRST_RETRY_S)} == {A, ""}


def test_two_ways_to_one_device_are_one_too_many() -> None:
    of = directory()
    of.saw(Sighting("", "", (AT_B,), How.TOLD), 0.0)
    of.saw(sighting(), 0.0)
    by_id = {attempt.device_id: attempt for attempt in of.due(0.0)}
    assert of.reached(by_id[A], A, "a", AT_A, 0.0) is Verdict.NEW
    assert of.reached(by_id[""], A, "a", AT_B, 0.0) is Verdict.DOUBLE
    assert of.next_due() is None


def test_a_told_address_that_is_our_own_is_dropped() -> None:
    of = directory()
    of.saw(Sighting("", "", (AT_A,), How.TOLD), 0.0)
    (attempt,) = of.due(0.0)
    assert of.reached(attempt, ME, "me", AT_A, 0.0) is Verdict.OURSELVES
    assert of.next_due() is None


def test_people_are_told_once_of_who_does_not_answer() -> None:
    of = directory()
    of.saw(Sighting("", "", (AT_A,), How.TOLD), 0.0)
    of.saw(sighting(B, AT_B), 0.0)
    words = [
        [each.device_id for each in of.due(now) if of.failed(each, now)]
        for now in range(0, 200, 40)
    ]
    assert words == [[""], [B], [], [], []]


def test_gossip_comes_after_what_a_device_says_of_itself() -> None:
    of = directory()
    of.saw(sighting(A, AT_A), 0.0)
    of.saw(sighting(A, AT_B, how=How.GOSSIP), 0.0)
    assert of.devices()[0].addresses == (AT_A, AT_B)


def test_lies_do_not_push_out_the_address_where_a_device_is() -> None:
    of = directory()
    of.saw(sighting(), 0.0)
    reached(of)
    of.saw(sighting(A, *[("10.9.9.9", port) for port in range(1, 17)]), 1.0)
    assert AT_A in of.devices()[0].addresses


def test_a_flood_of_devices_pushes_out_nobody_who_is_reached() -> None:
    of = directory()
    of.saw(sighting(), 0.0)
    reached(of)
    for number in range(3 * MAX_DEVICES):
        of.saw(sighting(f"{number + 1:064x}"), float(number))
        of.saw(Sighting("", "", (("10.0.0.1", number + 1),), How.TOLD), float(number))
    devices = of.devices()
    assert len(devices) == MAX_DEVICES
    assert devices[0].device_id == A
    assert devices[-1].device_id == f"{3 * MAX_DEVICES:064x}"
    assert len(of.due(1e9, 10_000)) == MAX_DEVICES - 1 + MAX_TARGETS


def test_newcomers_come_before_those_who_fail_again_and_again() -> None:
    of = directory()
    for number in range(100):
        of.saw(sighting(f"{number + 1:064x}"), 0.0)
    for attempt in of.due(0.0):
        of.failed(attempt, 0.0)
    of.saw(sighting(A), 50.0)
    (first, *others) = of.due(50.0, 32)
    assert first.device_id == A
    assert len(others) == 31
    assert len(of.due(50.0)) == 69


def test_only_who_was_reached_is_remembered() -> None:
    of = directory()
    of.saw(sighting(A), 0.0)
    reached(of)
    of.saw(sighting(B, AT_B), 0.0)
    assert [each.device_id for each in of.remembered()] == [A]


Step = tuple[str, int, int]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("stfrolx"), st.integers(0, 3), st.integers(0, 3)),
                max_size=60), st.integers())  # fmt: skip
def test_whatever_happens_nobody_is_tried_twice_at_once(steps: list[Step], seed: int) -> None:
    ids = [ME, A, B, "c" * 64]
    ports = [("10.0.0.1", port) for port in range(1, 5)]
    of, now = Directory(ME, random.Random(seed).random), 0.0
    under_way: list[Attempt] = []
    for kind, who, where in steps:
        now += 0.3
        if kind == "s":
            of.saw(sighting(ids[who], ports[where]), now)
        elif kind == "t":
            of.saw(Sighting("", "", (ports[where],), How.TOLD), now)
        elif kind == "l":
            of.lost(ids[who], now)
        elif kind == "x":
            new = of.due(now)
            keys = [each.device_id or each.addresses for each in [*under_way, *new]]
            assert len(set(keys)) == len(keys)
            under_way += new
        elif under_way:
            attempt = under_way.pop(where % len(under_way))
            if kind == "f":
                of.failed(attempt, now)
            else:
                at = attempt.addresses[0] if attempt.addresses else ports[where]
                before = {d.device_id for d in of.devices() if d.state is State.REACHED}
                verdict = of.reached(attempt, ids[who], "x", at, now)
                assert (verdict is Verdict.OURSELVES) == (ids[who] == ME)
                if verdict is Verdict.NEW:
                    assert ids[who] not in before
    assert ME not in {device.device_id for device in of.devices()}


# --- what strangers claim -------------------------------------------------------------

anything = st.none() | st.integers() | st.text() | st.binary() | st.tuples(st.text(), st.integers())


@given(anything | st.just(A), anything, st.lists(anything | st.just(AT_A), max_size=40))
def test_a_claim_is_a_sound_sighting_or_none(
    device: object, name: object, addresses: list[object]
) -> None:
    made = sighting_from(device, name, addresses, How.MDNS)
    if made is None:
        assert device != A or AT_A not in addresses
    else:
        assert made.device_id == device
        assert made.name == "" or (made.name == name and made.name.isprintable())
        assert len(made.name) <= 64
        assert 0 < len(made.addresses) <= MAX_ADDRESSES


def test_a_claim_is_cut_to_size() -> None:
    many = [("10.0.0.1", port) for port in range(1, 100)]
    made = sighting_from(A, "\x1b[31mred", [AT_A, AT_A, *many], How.GOSSIP)
    assert made is not None
    assert (made.name, len(made.addresses), len(set(made.addresses))) == ("", 16, 16)
