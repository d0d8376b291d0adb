"""Records of members merge to one answer, in whatever order and however often they arrive."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import PairingError
from edgellm.identity.device import make_identity
from edgellm.identity.members import (
    MAX_ENCODED_BYTES,
    MAX_MEMBERS,
    MAX_VERSION,
    Member,
    Members,
    decode_cluster,
    encode_cluster,
)

pytestmark = pytest.mark.pure

DEVICES = tuple(make_identity() for _ in range(4))
IDS = tuple(each.device_id for each in DEVICES)
CLUSTER = "0123456789abcdef" * 2


@st.composite
def records(draw: st.DrawFn) -> Member:
    device = draw(st.sampled_from(DEVICES))
    forgotten = draw(st.booleans())
    empty = forgotten and draw(st.booleans())
    return Member(
        device.device_id,
        draw(st.sampled_from(["anna", "bert", "Zoë"])),
        b"" if empty else device.certificate,
        draw(st.sampled_from([1, 2, 3, MAX_VERSION])),
        forgotten,
        draw(st.sampled_from(["", *IDS])),
    )


MANY = st.lists(records(), max_size=12)


@given(MANY, st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(some: list[Member], shuffle: random.Random) -> None:
    merged = Members(some)
    again = list(some) * 2
    shuffle.shuffle(again)
    one_by_one = Members()
    for record in again:
        one_by_one = one_by_one.merge([record])
    assert one_by_one == merged
    assert hash(one_by_one) == hash(merged)


@given(MANY, MANY, MANY)
def test_merge_is_a_lattice(a: list[Member], b: list[Member], c: list[Member]) -> None:
    one, two, three = Members(a), Members(b), Members(c)
    assert one.merge(two) == two.merge(one)
    assert one.merge(two).merge(three) == one.merge(two.merge(three))
    assert one.merge(one) is one


@given(MANY)
def test_the_higher_version_counts_and_a_tie_is_forgotten(some: list[Member]) -> None:
    merged = Members(some)
    for device_id in IDS:
        of_it = [r for r in some if r.device_id == device_id]
        if not of_it:
            assert device_id not in merged
            assert not merged.trusted(device_id)
            continue
        top = max(r.version for r in of_it)
        found = merged.get(device_id)
        assert found is not None
        assert found.version == top
        assert found.forgotten == any(r.forgotten for r in of_it if r.version == top)
        assert merged.trusted(device_id) != found.forgotten


@given(MANY, st.sampled_from(IDS))
def test_forget_holds_against_everything_known_before(some: list[Member], device_id: str) -> None:
    members = Members(some)
    if device_id not in members:
        with pytest.raises(PairingError):
            members.forget(device_id)
        return
    forgotten = members.forget(device_id, by=IDS[0])
    assert not forgotten.trusted(device_id)
    assert not forgotten.merge(some).trusted(device_id)
    assert not Members(some).merge(forgotten).trusted(device_id)
    assert forgotten.forget(device_id) is forgotten


@given(MANY, st.sampled_from(DEVICES), st.integers(0, 5))
def test_admitting_holds_against_everything_known_before(
    some: list[Member], device: object, above: int
) -> None:
    chosen = next(each for each in DEVICES if each is device)
    members = Members(some)
    known = members.get(chosen.device_id)
    if known is not None and known.version == MAX_VERSION:
        with pytest.raises(PairingError):
            members.admit(chosen.device_id, "carla", chosen.certificate)
        return
    admitted = members.admit(chosen.device_id, "carla", chosen.certificate, above=above)
    assert admitted.merge(some).trusted(chosen.device_id)
    record = admitted.get(chosen.device_id)
    assert record is not None
    assert record.version > above


@given(MANY)
def test_what_is_written_is_read_again(some: list[Member]) -> None:
    members = Members(some)
    assert decode_cluster(encode_cluster(CLUSTER, members)) == (CLUSTER, members)


def test_the_largest_cluster_can_be_written() -> None:
    """256 devices, with names of the widest letters; real certificates, as big as they get."""
    name = "\U0001f600" * 64
    tombstones = [Member(f"{i:064x}", name, b"", MAX_VERSION, True, IDS[0]) for i in range(255)]
    members = Members([*tombstones, Member(IDS[0], name, DEVICES[0].certificate)])
    with_certificates = len(encode_cluster(CLUSTER, members)) + 255 * 2048 * 4 // 3
    assert with_certificates <= MAX_ENCODED_BYTES
    with pytest.raises(PairingError, match=str(MAX_MEMBERS)):
        members.admit(IDS[1], "one-more", DEVICES[1].certificate)
    assert members.merge([Member(IDS[0], name, DEVICES[0].certificate, 2)]).trusted(IDS[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"device_id": "x"},
        {"device_id": IDS[0].upper()},
        {"device_id": IDS[1]},
        {"device_id": IDS[0] + "\n"},
        {"name": ""},
        {"name": "two words"},
        {"name": "\x1b[2J"},
        {"name": "x" * 65},
        {"certificate": b""},
        {"certificate": b"x" * 500},
        {"certificate": DEVICES[1].certificate},
        {"version": 0},
        {"version": MAX_VERSION + 1},
        {"introduced_by": "anna"},
        {"forgotten": True, "certificate": DEVICES[1].certificate},
    ],
)
def test_records_that_do_not_fit_together_are_refused(wrong: dict[str, object]) -> None:
    good: dict[str, object] = {
        "device_id": IDS[0],
        "name": "anna",
        "certificate": DEVICES[0].certificate,
    }
    Member(**good)  # type: ignore[arg-type]
    with pytest.raises(PairingError):
        Member(**{**good, **wrong})  # type: ignore[arg-type]


@given(st.binary(max_size=300), st.randoms(use_true_random=False))
def test_garbage_is_refused(garbage: bytes, chance: random.Random) -> None:
    with pytest.raises(PairingError):
        decode_cluster(garbage)
    text = bytearray(encode_cluster(CLUSTER, Members([Member(IDS[0], "anna", b"", 1, True)])))
    text[chance.randrange(len(text))] = chance.randrange(256)
    try:
        decode_cluster(bytes(text))
    except PairingError:
        return
