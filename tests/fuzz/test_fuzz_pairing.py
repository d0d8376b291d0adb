"""Pairing's invariant: whatever arrives, nothing is raised by ``receive``, little memory is held,
``result`` is a PairingError, and nothing is pinned. Unless every byte was as it was said."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.errors import PairingError
from edgellm.identity import pake
from edgellm.identity.invitation import Invitation
from edgellm.identity.pairing import MAGIC, Inviter, Joiner, Kind
from edgellm.identity.trust import TrustStore
from tests.pairs import CODE, NOW, Wire, device, founder

FLIPS = 120
HEADER = 5


@pytest.fixture(scope="module")
def inviting(tmp_path_factory: pytest.TempPathFactory) -> TrustStore:
    return founder(tmp_path_factory.mktemp("inviting"))


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> TrustStore:
    return device(tmp_path_factory.mktemp("joining"))


def sides(joining: TrustStore, inviting: TrustStore) -> tuple[Joiner, Inviter]:
    return (
        Joiner(joining, "bert", CODE, NOW),
        Inviter(inviting, Invitation(NOW, code=CODE), NOW),
    )


def failed(side: Joiner | Inviter) -> bool:
    side.close()
    try:
        side.result  # noqa: B018
    except PairingError:
        return True
    return False


class Meddler(Wire):
    """Carries an exchange and changes the byte at one place of all that one side says."""

    def __init__(self, position: int, mask: int, *, of_joiner: bool) -> None:
        super().__init__()
        self._left = position
        self._mask = mask
        self.done = False
        if of_joiner:
            self.to_inviter = self._meddle
        else:
            self.to_joiner = self._meddle

    def _meddle(self, said: bytes) -> bytes:
        if self.done or self._left >= len(said):
            self._left -= 0 if self.done else len(said)
            return said
        self.done = True
        changed = bytearray(said)
        changed[self._left] ^= self._mask
        return bytes(changed)


def lengths(joining: TrustStore, inviting: TrustStore) -> tuple[int, int]:
    """What each side says in an undisturbed exchange; leaves nothing pinned."""
    wire = Wire()
    joiner, inviter = sides(joining, inviting)
    wire.run(joiner, inviter)
    assert joiner.result.inviter.name == "anna"
    assert inviter.result.name == "bert"
    inviting.forget(joining.identity.device_id)
    return sum(map(len, wire.joiner_said)), sum(map(len, wire.inviter_said))


def positions(total: int, chance: random.Random) -> list[int]:
    return sorted(chance.sample(range(total), min(total, FLIPS)))


def test_any_changed_byte_of_the_joiner_pins_nothing(
    joining: TrustStore, inviting: TrustStore
) -> None:
    chance = random.Random(11)
    said, _ = lengths(joining, inviting)
    # Every byte up to the card, which is where the states are; a sample of the sealed card.
    before_card = len(MAGIC) + HEADER + 32 + HEADER + pake.SHARE_BYTES
    sample = positions(before_card, chance) + [
        before_card + each for each in positions(said - before_card, chance)
    ]
    for position in sample:
        joiner, inviter = sides(joining, inviting)
        meddler = Meddler(position, 1 << chance.randrange(8), of_joiner=True)
        meddler.run(joiner, inviter)
        assert meddler.done
        assert failed(inviter), f"byte {position}"
        assert failed(joiner), f"byte {position}"
        assert not inviting.trusted(joining.identity.device_id)


def test_any_changed_byte_of_the_inviter_pins_nothing(
    joining: TrustStore, inviting: TrustStore
) -> None:
    chance = random.Random(12)
    _, said = lengths(joining, inviting)
    before_cluster = 3 * HEADER + 48 + pake.SHARE_BYTES + pake.PROOF_BYTES
    sample = list(range(before_cluster + HEADER)) + [
        before_cluster + HEADER + each
        for each in positions(said - before_cluster - HEADER - 8, chance)[: FLIPS // 2]
    ]
    for position in sample:
        joiner, inviter = sides(joining, inviting)
        meddler = Meddler(position, 1 << chance.randrange(8), of_joiner=False)
        meddler.run(joiner, inviter)
        assert meddler.done
        assert failed(joiner), f"byte {position}"
        assert len(joining.members) == 0
        if inviting.trusted(joining.identity.device_id):  # it did prove itself, undisturbed
            assert position >= 2 * HEADER + 48 + pake.SHARE_BYTES
            inviting.forget(joining.identity.device_id)


def test_cut_at_every_byte(joining: TrustStore, inviting: TrustStore) -> None:
    """Each side hears the beginning of what is said to it, then the connection ends."""
    joiner_says, inviter_says = lengths(joining, inviting)
    joiner, inviter = sides(joining, inviting)
    heard_by_inviter, heard_by_joiner = 0, 0
    said = joiner.start()
    while said:
        answer = bytearray()
        for at in range(len(said)):
            assert not inviter.finished, heard_by_inviter
            answer += inviter.receive(said[at : at + 1], NOW)
            heard_by_inviter += 1
            assert inviting.trusted(joining.identity.device_id) == (heard_by_inviter == joiner_says)
        said = b""
        for at in range(len(answer)):
            assert not joiner.finished, heard_by_joiner
            with pytest.raises(PairingError):
                joiner.result  # noqa: B018
            said += joiner.receive(bytes(answer[at : at + 1]), NOW)
            heard_by_joiner += 1
    assert (heard_by_inviter, heard_by_joiner) == (joiner_says, inviter_says)
    assert joiner.result.inviter.name == "anna"
    inviting.forget(joining.identity.device_id)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=200), max_size=6), st.booleans())
def test_garbage(
    joining: TrustStore, inviting: TrustStore, pieces: list[bytes], magic: bool
) -> None:
    joiner, inviter = sides(joining, inviting)
    joiner.start()
    if magic:
        inviter.receive(MAGIC, NOW)
    for piece in pieces:
        for side in (joiner, inviter):
            side.receive(piece, NOW)
            assert len(side._buffer) <= sum(map(len, pieces)) + len(MAGIC)
    assert failed(joiner)
    assert failed(inviter)
    assert not inviting.trusted(joining.identity.device_id)
    assert len(joining.members) == 0


FRAMES = st.tuples(
    st.one_of(st.sampled_from(list(Kind)).map(int), st.integers(0, 255)),
    st.one_of(st.none(), st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF])),
    st.one_of(st.sampled_from([b"", bytes(2), bytes(32), bytes(33), bytes(48)]), st.binary()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FRAMES, max_size=8))
def test_frames_of_any_kind_in_any_order(
    joining: TrustStore, inviting: TrustStore, frames: list[tuple[int, int | None, bytes]]
) -> None:
    joiner, inviter = sides(joining, inviting)
    joiner.start()
    inviter.receive(MAGIC, NOW)
    for kind, length, body in frames:
        frame = struct.pack(">BI", kind, len(body) if length is None else length) + body
        for side in (joiner, inviter):
            side.receive(frame, NOW)
    assert failed(joiner)
    assert failed(inviter)
    assert not inviting.trusted(joining.identity.device_id)
    assert len(joining.members) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(min_size=33, max_size=33), st.binary(min_size=32, max_size=32)))
def test_any_share_is_a_share_or_a_pairing_error(share: bytes) -> None:
    exchange = pake.Exchange(CODE, joiner="a", inviter="b", joins=False)
    try:
        keys = exchange.finish(b"A" + share[:32] if len(share) == 32 else share, bytes(32))
    except PairingError:
        return
    assert len(keys.joiner_seal) == 32


def low_order_points() -> list[bytes]:
    """Points that would make every key the same: the neutral one, those of order 2 and 4, and
    encodings of more than the field."""
    prime = 2**255 - 19
    return [each.to_bytes(32, "little") for each in (1, prime - 1, 0, prime, prime + 1, 2**255 + 1)]


@pytest.mark.parametrize("point", low_order_points())
def test_weak_points_are_refused(point: bytes) -> None:
    exchange = pake.Exchange(CODE, joiner="a", inviter="b", joins=False)
    with pytest.raises(PairingError):
        exchange.finish(b"A" + point, bytes(32))


def test_a_reflected_share_is_refused() -> None:
    exchange = pake.Exchange(CODE, joiner="a", inviter="b", joins=False)
    with pytest.raises(PairingError):
        exchange.finish(b"A" + exchange.share[1:], bytes(32))


def test_nothing_large_is_awaited_of_a_stranger(joining: TrustStore, inviting: TrustStore) -> None:
    """The one large frame may be announced only after the inviter's proof."""
    for kind in Kind:
        joiner, inviter = sides(joining, inviting)
        joiner.start()
        inviter.receive(MAGIC, NOW)
        huge = struct.pack(">BI", kind, 1 << 20)
        for side in (joiner, inviter):
            side.receive(huge, NOW)
            assert side.finished
            assert not side._buffer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_garbage_frames(tmp_path: Path) -> None:
    inviting, joining = founder(tmp_path / "a"), device(tmp_path / "b")
    chance = random.Random(13)
    for _ in range(1_000_000):
        joiner, inviter = sides(joining, inviting)
        joiner.start()
        garbage = chance.randbytes(chance.randrange(64))
        inviter.receive(chance.choice((b"", MAGIC)) + garbage, NOW)
        joiner.receive(garbage, NOW)
        assert failed(inviter)
        assert failed(joiner)
