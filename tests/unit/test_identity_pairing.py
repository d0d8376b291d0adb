"""Pairing: who has the code gets in, once; who has not learns nothing and changes nothing."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm.errors import PairingError, UsageError
from edgellm.identity import pake
from edgellm.identity.device import device_id_of, make_identity
from edgellm.identity.invitation import (
    ATTEMPT_S,
    CODE_DIGITS,
    TRIES,
    WITHIN_S,
    Invitation,
    Reason,
    check_code,
)
from edgellm.identity.members import MAX_MEMBERS, Member
from edgellm.identity.pairing import MAGIC, Inviter, Joined, Joiner, Kind
from edgellm.identity.refusals import RefusedError
from edgellm.identity.trust import TrustStore
from tests.pairs import CODE, NOW, Wire, device, founder, pair

WRONG = "87654321"


@pytest.fixture
def inviting(tmp_path: Path) -> TrustStore:
    return founder(tmp_path / "inviting")


@pytest.fixture
def joining(tmp_path: Path) -> TrustStore:
    return device(tmp_path / "joining")


def invite() -> Invitation:
    return Invitation(NOW, code=CODE)


def attempt(
    joining: TrustStore,
    inviting: TrustStore,
    invitation: Invitation | None,
    code: str = CODE,
    now: float = NOW,
) -> tuple[Joiner, Inviter]:
    joiner, inviter = Joiner(joining, "bert", code, now), Inviter(inviting, invitation, now)
    Wire().run(joiner, inviter, now)
    return joiner, inviter


def nothing_pinned(joining: TrustStore, inviting: TrustStore) -> bool:
    return len(inviting.members) == 1 and len(joining.members) == 0


def failures(joiner: Joiner, inviter: Inviter) -> tuple[PairingError, PairingError]:
    found: list[PairingError] = []
    results: tuple[Callable[[], object], ...] = (lambda: joiner.result, lambda: inviter.result)
    for result in results:
        with pytest.raises(PairingError) as caught:
            result()
        found.append(caught.value)
    return found[0], found[1]


# ------------------------------------------------------------------------------------- it works


def test_the_right_code_makes_both_trust_each_other(
    joining: TrustStore, inviting: TrustStore
) -> None:
    carla = make_identity()
    inviting.add(carla.device_id, "carla", carla.certificate)
    invitation = invite()
    joiner, inviter = pair(joining, inviting, invitation)
    assert joiner.finished
    assert inviter.finished
    joined = joiner.result
    assert joined.inviter.name == "anna"
    assert len(joining.members) == 0  # the result is only an offer
    joined.adopt(joining)
    assert inviter.result.name == "bert"
    assert inviter.result.introduced_by == inviting.identity.device_id
    assert joining.members == inviting.members
    assert joining.cluster_id == inviting.cluster_id
    assert joining.trusted(carla.device_id)  # who joins one joins all
    assert invitation.closed(NOW) is Reason.USED
    assert invitation.joined == joining.identity.device_id


def test_any_pieces_of_the_stream_will_do(joining: TrustStore, inviting: TrustStore) -> None:
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    said = joiner.start()
    while said:
        answer = b"".join(inviter.receive(said[i : i + 1], NOW) for i in range(len(said)))
        said = b"".join(joiner.receive(answer[i : i + 1], NOW) for i in range(len(answer)))
    joiner.result.adopt(joining)
    assert joining.trusted(inviter.result.introduced_by)


def test_the_largest_cluster_fits(joining: TrustStore, inviting: TrustStore) -> None:
    """And what is sent besides it is small."""
    crowd = [make_identity() for _ in range(MAX_MEMBERS - 2)]
    inviting.merge([Member(each.device_id, "x" * 64, each.certificate) for each in crowd])
    wire = Wire()
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    wire.run(joiner, inviter)
    joiner.result.adopt(joining)
    assert len(joining.members) == MAX_MEMBERS
    assert sum(map(len, wire.joiner_said)) + sum(map(len, wire.inviter_said[:-1])) < 2048
    assert len(wire.inviter_said[-1]) < MAX_MEMBERS * 1200


def test_a_device_that_founded_its_own_cluster_may_join(
    joining: TrustStore, inviting: TrustStore
) -> None:
    joining.found("bert")
    pair(joining, inviting)[0].result.adopt(joining)
    assert joining.cluster_id == inviting.cluster_id


def test_pairing_again_and_after_forgetting(joining: TrustStore, inviting: TrustStore) -> None:
    pair(joining, inviting)[0].result.adopt(joining)
    joiner, inviter = pair(joining, inviting)  # known
    joiner.result.adopt(joining)
    assert inviter.result.version == 2
    inviting.forget(joining.identity.device_id)
    assert not inviting.trusted(joining.identity.device_id)
    joiner, inviter = pair(joining, inviting)  # forgotten, and it does not know yet
    joiner.result.adopt(joining)
    assert inviter.result.version == 4
    assert inviting.trusted(joining.identity.device_id)
    assert not joining.expelled
    # The joiner heard of a tombstone that the inviter has not seen: it must not win afterwards.
    me = joining.identity
    joining.merge([Member(me.device_id, "bert", me.certificate, 9, True)])
    joiner, inviter = pair(joining, inviting)
    joiner.result.adopt(joining)
    assert inviter.result.version == 10
    inviting.merge(tuple(joining.members))
    assert inviting.trusted(me.device_id)


def test_a_joiner_that_had_forgotten_the_inviter(joining: TrustStore, inviting: TrustStore) -> None:
    pair(joining, inviting)[0].result.adopt(joining)
    inviter_id = inviting.identity.device_id
    joining.forget(inviter_id)
    pair(joining, inviting)[0].result.adopt(joining)
    assert joining.trusted(inviter_id)
    inviting.merge(tuple(joining.members))
    assert not inviting.expelled


@pytest.mark.parametrize("name", ["b", "\U0001f600" * 64])
def test_names_of_any_length(joining: TrustStore, inviting: TrustStore, name: str) -> None:
    joiner, inviter = Joiner(joining, name, CODE, NOW), Inviter(inviting, invite(), NOW)
    Wire().run(joiner, inviter)
    joiner.result.adopt(joining)
    assert inviter.result.name == name


def test_codes_are_typed_by_people() -> None:
    assert check_code(" 1234-5678\n") == check_code("1234 5678") == "12345678"
    for wrong in ("", "1234567", "123456789", "1234567a", "\uff11" * 8, "-1234567"):
        with pytest.raises(PairingError, match="8 digits"):
            check_code(wrong)


def test_codes_are_random_and_not_shown_by_accident() -> None:
    codes = {Invitation(NOW).code for _ in range(200)}
    assert len(codes) > 190
    assert {len(code) for code in codes} == {CODE_DIGITS}
    assert CODE not in repr(invite())


# ---------------------------------------------------------------------------------- wrong codes


def test_a_wrong_code_burns_a_try_and_three_close_the_window(
    joining: TrustStore, inviting: TrustStore
) -> None:
    invitation = invite()
    said = []
    for left in (2, 1, 0):
        joiner, inviter = attempt(joining, inviting, invitation, WRONG)
        mine, theirs = failures(joiner, inviter)
        said.append(str(mine))
        assert invitation.tries_left == left
        assert "wrong code" in str(theirs)
        for error in (mine, theirs):
            assert isinstance(error, RefusedError)
            assert (error.reason, error.tries_left) == (Reason.WRONG_CODE, left)
    assert "2 tries are left" in said[0]
    assert "1 try is left" in said[1]
    assert "the invitation is closed" in said[2]
    joiner, inviter = attempt(joining, inviting, invitation, CODE, NOW + 3)  # too late
    assert "too many wrong codes" in str(failures(joiner, inviter)[0])
    assert nothing_pinned(joining, inviting)


def test_two_wrong_codes_then_the_right_one(joining: TrustStore, inviting: TrustStore) -> None:
    invitation = invite()
    for _ in range(TRIES - 1):
        attempt(joining, inviting, invitation, WRONG)
    attempt(joining, inviting, invitation)[0].result.adopt(joining)
    assert inviting.trusted(joining.identity.device_id)


def guess_all(joining: TrustStore, inviting: TrustStore, guesses: int) -> None:
    """Each invitation is guessed at until it closes, by as many wrong codes as it takes."""
    chance = random.Random(guesses)
    wrong, made, now = 0, 0, NOW
    invitation = Invitation(now)
    while wrong < guesses:
        if invitation.closed(now) is not None:
            assert invitation.closed(now) is Reason.CLOSED
            invitation = Invitation(now)
            made += 1
        code = f"{chance.randrange(10**CODE_DIGITS):08d}"
        if code == invitation.code:
            continue
        joiner, inviter = attempt(joining, inviting, invitation, code, now)
        failures(joiner, inviter)
        wrong += 1
        now += 3.0
    assert made == (guesses - 1) // TRIES
    assert nothing_pinned(joining, inviting)


def test_100_wrong_codes(joining: TrustStore, inviting: TrustStore) -> None:
    guess_all(joining, inviting, 100)
    attempt(joining, inviting, invite())[0].result.adopt(joining)  # the same steps do let one in


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_10000_wrong_codes(joining: TrustStore, inviting: TrustStore) -> None:
    guess_all(joining, inviting, 10_000)


def test_10000_forged_proofs(joining: TrustStore, inviting: TrustStore) -> None:
    """What three tries cannot: without SPAKE2's cost, and with the window held open by force."""
    chance = random.Random(4)
    invitation = invite()
    joiner = Joiner(joining, "bert", CODE, NOW)
    inviter = Inviter(inviting, invitation, NOW)
    share = joiner.receive(inviter.receive(joiner.start(), NOW), NOW)
    inviter.receive(share, NOW)
    keys = inviter._keys
    assert keys is not None
    said = inviter._before
    for _ in range(10_000):
        assert not pake.proves(keys.joiner_proof, said, chance.randbytes(pake.PROOF_BYTES))
    assert pake.proves(keys.joiner_proof, said, pake.prove(keys.joiner_proof, said))


def test_who_gives_up_before_the_proof_got_a_point_and_cost_no_try(
    joining: TrustStore, inviting: TrustStore
) -> None:
    """What was said till then explains itself under every code: for each there is a random number
    that would have given the very same share, so there is nothing to try codes on."""
    invitation = invite()
    for number in range(20):
        now = NOW + number  # at most three attempts begin within 2 s
        joiner = Joiner(joining, "bert", WRONG, now)
        inviter = Inviter(inviting, invitation, now)
        share = joiner.receive(inviter.receive(joiner.start(), now), now)
        answer = inviter.receive(share, now)
        inviter.close()
        assert answer[0] == Kind.INVITER_SHARE
        assert len(answer) == 5 + pake.SHARE_BYTES
    assert invitation.tries_left == TRIES
    _, inviter = attempt(joining, inviting, invitation, CODE, NOW + 25)
    assert inviter.result.device_id == joining.identity.device_id


def test_parallel_attempts_share_the_tries(joining: TrustStore, inviting: TrustStore) -> None:
    invitation = invite()
    invitation.tries_left = 1
    sides = [
        (Joiner(joining, "bert", code, NOW), Inviter(inviting, invitation, NOW))
        for code in (WRONG, CODE)
    ]
    proofs = []
    for joiner, inviter in sides:
        share = joiner.receive(inviter.receive(joiner.start(), NOW), NOW)
        proofs.append(joiner.receive(inviter.receive(share, NOW), NOW))
    for (joiner, inviter), proof in zip(sides, proofs, strict=True):
        joiner.receive(inviter.receive(proof, NOW), NOW)
        failures(joiner, inviter)
    assert nothing_pinned(joining, inviting)


def test_one_invitation_lets_one_device_in(
    tmp_path: Path, joining: TrustStore, inviting: TrustStore
) -> None:
    invitation = invite()
    attempt(joining, inviting, invitation)
    late = device(tmp_path / "late")
    joiner, inviter = attempt(late, inviting, invitation)
    assert "another device has used" in str(failures(joiner, inviter)[0])
    assert not inviting.trusted(late.identity.device_id)


# ------------------------------------------------------------------------------ limits and time


def test_no_invitation_and_an_expired_one(joining: TrustStore, inviting: TrustStore) -> None:
    mine, _ = failures(*attempt(joining, inviting, None))
    assert "no invitation open" in str(mine)
    assert "edgellm invite" in str(mine)
    invitation = invite()
    assert invitation.expires_in(NOW + 20) == WITHIN_S - 20
    mine, _ = failures(*attempt(joining, inviting, invitation, CODE, NOW + WITHIN_S))
    assert "expired" in str(mine)
    assert nothing_pinned(joining, inviting)
    attempt(joining, inviting, invitation, CODE, NOW + WITHIN_S - 0.1)[1].result  # noqa: B018


def test_an_invitation_that_expires_during_an_attempt(
    joining: TrustStore, inviting: TrustStore
) -> None:
    invitation = invite()
    began = NOW + WITHIN_S - 1
    joiner, inviter = Joiner(joining, "bert", CODE, began), Inviter(inviting, invitation, began)
    share = joiner.receive(inviter.receive(joiner.start(), began), began)
    proof = joiner.receive(inviter.receive(share, began), began)
    joiner.receive(inviter.receive(proof, began + 2), began + 2)
    assert "expired" in str(failures(joiner, inviter)[0])
    assert nothing_pinned(joining, inviting)


def test_an_exchange_ends_in_time(joining: TrustStore, inviting: TrustStore) -> None:
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    joiner.start()
    assert joiner.deadline == inviter.deadline == NOW + ATTEMPT_S
    assert not inviter.receive(b"", NOW + ATTEMPT_S - 0.01)
    assert not inviter.finished
    for side in (joiner, inviter):
        assert side.receive(b"", NOW + ATTEMPT_S)[0] == Kind.REFUSAL
        assert side.finished
    for error in failures(joiner, inviter):
        assert "too long" in str(error)


def test_a_connection_that_ends(joining: TrustStore, inviting: TrustStore) -> None:
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    joiner.start()
    for side in (joiner, inviter):
        side.close()
        assert side.finished
        assert side.receive(b"x", NOW) == b""
    for error in failures(joiner, inviter):
        assert "ended the connection" in str(error)


def test_attempts_that_are_given_up_neither_block_the_window_nor_cost_much(
    joining: TrustStore, inviting: TrustStore
) -> None:
    """Somebody opens 20 connections a second for 8 s and gives each up: the inviter calculates at
    most 3 times in 2 s, and an honest device that tries again after 2 s gets in."""
    offer = Inviter(inviting, invite(), NOW)
    joiner = Joiner(joining, "x", WRONG, NOW)
    share = joiner.receive(offer.receive(joiner.start(), NOW), NOW)
    hello = Joiner(joining, "x", WRONG, NOW).start()
    invitation = invite()
    calculated = 0
    for tick in range(160):
        now = NOW + tick * 0.05
        inviter = Inviter(inviting, invitation, now)
        assert inviter.receive(hello, now)[0] == Kind.OFFER
        calculated += inviter.receive(share, now)[0] == Kind.INVITER_SHARE
    assert 3 <= calculated <= 3 * (8 / 2 + 1)
    later = NOW + 8 + 2
    attempt(joining, inviting, invitation, CODE, later)[0].result.adopt(joining)


def test_places_for_attempts() -> None:
    invitation = invite()
    first = invitation.begin(NOW)
    others = [invitation.begin(NOW + 1), invitation.begin(NOW + 1)]
    assert first is not None
    assert all(others)
    assert invitation.begin(NOW + 1.9) is None
    assert first.live
    assert invitation.begin(NOW + 2) is not None  # the oldest makes way
    assert not first.live
    assert invitation.begin(NOW + 2.5) is None
    assert invitation.begin(NOW + 30) is not None
    assert not any(each is not None and each.live for each in others)


def test_invitations_last_a_sensible_time(inviting: TrustStore, joining: TrustStore) -> None:
    for within in (0.0, -1.0, 3601.0, float("nan"), float("inf")):
        with pytest.raises(UsageError):
            Invitation(NOW, within_s=within)
    with pytest.raises(UsageError):
        Inviter(joining, invite(), NOW)  # belongs to no cluster


# -------------------------------------------------------------------------- who may not be paired


def test_a_device_of_another_cluster_is_refused_before_it_says_anything(
    joining: TrustStore, inviting: TrustStore
) -> None:
    joining.found("bert")
    other = make_identity()
    joining.add(other.device_id, "carla", other.certificate)
    before = joining.members
    invitation = invite()
    wire = Wire()
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invitation, NOW)
    wire.run(joiner, inviter)
    mine, theirs = failures(joiner, inviter)
    assert "already belongs to another cluster" in str(mine)
    assert "forget" in str(mine)
    assert "another cluster" in str(theirs)
    assert [said[0] for said in wire.joiner_said] == [MAGIC[0], Kind.REFUSAL]
    assert invitation.tries_left == TRIES
    assert joining.members == before
    assert len(inviting.members) == 1


def test_a_device_cannot_pair_with_itself(inviting: TrustStore) -> None:
    for error in failures(*attempt(inviting, inviting, invite())):
        assert "itself" in str(error) or "the device that invites" in str(error)


def test_only_the_expected_device_is_answered(joining: TrustStore, inviting: TrustStore) -> None:
    for expected, works in ((inviting.identity.device_id, True), ("0" * 64, False)):
        joiner = Joiner(joining, "bert", CODE, NOW, inviter_id=expected)
        inviter = Inviter(inviting, invite(), NOW)
        Wire().run(joiner, inviter)
        if works:
            assert isinstance(joiner.result, Joined)
        else:
            assert "not the device" in str(failures(joiner, inviter)[0])


def test_an_impostor_inviter_without_the_code_gets_no_proof_back(
    tmp_path: Path, joining: TrustStore
) -> None:
    impostor = founder(tmp_path / "impostor", "mallory")
    joiner = Joiner(joining, "bert", CODE, NOW)
    inviter = Inviter(impostor, Invitation(NOW, code=WRONG), NOW)
    share = joiner.receive(inviter.receive(joiner.start(), NOW), NOW)
    joiner.receive(inviter.receive(share, NOW), NOW)
    # It goes on as if the proof were right.
    keys, said = inviter._keys, inviter._transcript.digest()
    assert keys is not None
    proof = (
        bytes([Kind.INVITER_PROOF]) + (32).to_bytes(4, "big") + pake.prove(keys.inviter_proof, said)
    )
    joiner.receive(proof, NOW)
    with pytest.raises(PairingError, match="not the device that shows the code"):
        joiner.result  # noqa: B018
    assert len(joining.members) == 0


# ------------------------------------------------------------------------- tampering and replays


def test_a_recorded_exchange_played_again_pins_nothing(
    joining: TrustStore, inviting: TrustStore
) -> None:
    wire = Wire()
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    wire.run(joiner, inviter)
    assert joiner.result.inviter.name == "anna"
    inviting.forget(joining.identity.device_id)
    again = invite()  # even the same code
    replayed = Inviter(inviting, again, NOW)
    for said in wire.joiner_said:
        replayed.receive(said, NOW)
    assert again.tries_left == TRIES - 1
    assert not inviting.trusted(joining.identity.device_id)
    # And towards the joiner.
    fresh = Joiner(joining, "bert", CODE, NOW)
    fresh.start()
    for said in wire.inviter_said:
        fresh.receive(said, NOW)
    with pytest.raises(PairingError):
        fresh.result  # noqa: B018


def test_ids_swapped_on_the_way_are_noticed(
    tmp_path: Path, joining: TrustStore, inviting: TrustStore
) -> None:
    """Somebody in between puts an own id in place of either, and carries the rest."""
    own = device(tmp_path / "mallory").identity.device_id
    for victim in (joining, inviting):
        old, new = bytes.fromhex(victim.identity.device_id), bytes.fromhex(own)
        wire = Wire(
            to_inviter=lambda said, old=old, new=new: said.replace(old, new),  # type: ignore[misc]
            to_joiner=lambda said, old=old, new=new: said.replace(old, new),  # type: ignore[misc]
        )
        joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
        wire.run(joiner, inviter)
        failures(joiner, inviter)
        assert nothing_pinned(joining, inviting)


def test_a_certificate_that_is_not_the_id_is_refused(
    tmp_path: Path, joining: TrustStore, inviting: TrustStore
) -> None:
    """A joiner that has the code claims another device's id, or sends another's certificate."""
    other = make_identity()
    me = joining.identity
    for claimed, shown in ((other.device_id, me.certificate), (me.device_id, other.certificate)):
        joining.identity = type(me)(claimed, shown, me.key)
        invitation = invite()
        joiner, inviter = attempt(joining, inviting, invitation)
        _, theirs = failures(joiner, inviter)
        assert "not its own" in str(theirs)
        assert invitation.closed(NOW) is None
        assert nothing_pinned(joining, inviting)
    joining.identity = type(me)(device_id_of(b"x" * 300), b"x" * 300, me.key)
    _, theirs = failures(*attempt(joining, inviting, invite()))
    assert "certificate cannot be used" in str(theirs)
    assert nothing_pinned(joining, inviting)


def test_a_name_that_would_paint_on_a_terminal_is_refused(
    joining: TrustStore, inviting: TrustStore
) -> None:
    with pytest.raises(UsageError):
        Joiner(joining, "\x1b[2J", CODE, NOW)
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    joiner._name = "\x1b[2J"  # another program's joiner may not mind
    Wire().run(joiner, inviter)
    assert "\x1b" not in str(failures(joiner, inviter)[1])
    assert nothing_pinned(joining, inviting)


@pytest.mark.parametrize(
    "cluster",
    [
        b"garbage",
        b"",
        b'{"format": 1, "cluster_id": "%s", "members": []}' % (b"0" * 32),
        b'{"format": 1, "cluster_id": "%s", "members": [1, {}]}' % (b"0" * 32),
    ],
)
def test_a_cluster_with_garbage_pins_nothing(
    joining: TrustStore,
    inviting: TrustStore,
    monkeypatch: pytest.MonkeyPatch,
    cluster: bytes,
) -> None:
    """From an inviter that has the code, so that proof and seal are right."""
    monkeypatch.setattr("edgellm.identity.pairing.encode_cluster", lambda *_: cluster)
    joiner, _ = attempt(joining, inviting, invite())
    with pytest.raises(PairingError):
        joiner.result  # noqa: B018
    assert len(joining.members) == 0


def test_a_cluster_without_both_devices_is_refused(
    joining: TrustStore, inviting: TrustStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.identity import members, pairing

    for left_out in (joining, inviting):

        def without(
            cluster_id: str, all_of_them: members.Members, out: TrustStore = left_out
        ) -> bytes:
            rest = [m for m in all_of_them if m.device_id != out.identity.device_id]
            return members.encode_cluster(cluster_id, members.Members(rest))

        with monkeypatch.context() as patched:
            patched.setattr(pairing, "encode_cluster", without)
            joiner, _ = attempt(joining, inviting, invite())
        with pytest.raises(PairingError):
            joiner.result  # noqa: B018


# ------------------------------------------------------------------------------------- crashes


def test_a_full_disk_lets_nobody_in_and_the_same_code_works_afterwards(
    joining: TrustStore, inviting: TrustStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = invite()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        joiner, inviter = attempt(joining, inviting, invitation)
    mine, theirs = failures(joiner, inviter)
    assert "could not let this one in" in str(mine)
    assert "No space left" in str(theirs)
    assert nothing_pinned(joining, inviting)
    attempt(joining, inviting, invitation)[0].result.adopt(joining)


@pytest.mark.parametrize("lost", range(3))
def test_a_connection_cut_before_any_answer_is_healed_by_a_new_invitation(
    joining: TrustStore, inviting: TrustStore, lost: int
) -> None:
    joiner, inviter = Joiner(joining, "bert", CODE, NOW), Inviter(inviting, invite(), NOW)
    said = joiner.start()
    for number in range(3):
        answer = inviter.receive(said, NOW)
        if number == lost:
            break
        said = joiner.receive(answer, NOW)
    joiner.close()
    inviter.close()
    with pytest.raises(PairingError):
        joiner.result  # noqa: B018
    assert len(joining.members) == 0
    # Only after its proof and its certificate is the joiner known there.
    assert inviting.trusted(joining.identity.device_id) == (lost == 2)
    pair(joining, inviting)[0].result.adopt(joining)
    assert joining.members == inviting.members
