"""The frames of pairing: their kinds, their sizes, and the card of a device. Pure.

May import ``errors`` and this package's limits. A frame is a byte for its kind, its length (4
bytes, big endian), and its body; no frame is kept that is longer than its kind allows.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping

from edgellm.errors import PairingError
from edgellm.identity import pake
from edgellm.identity.certificates import MAX_CERTIFICATE_BYTES
from edgellm.identity.members import MAX_ENCODED_BYTES, MAX_VERSION

MAGIC = b"EGP1"
"""A connection that begins so wants to pair; one of TLS begins with 0x16."""

HEADER = struct.Struct(">BI")
OFFER = struct.Struct(">32s16s")
CARD = struct.Struct(">QH")  # version and length of the name, which with its certificate follows
REFUSAL = struct.Struct(">BB")
_MAX_NAME_BYTES = 4 * 64  # UTF-8


class Kind(enum.IntEnum):
    HELLO = 1
    OFFER = 2
    JOINER_SHARE = 3
    INVITER_SHARE = 4
    JOINER_PROOF = 5
    CARD = 6
    INVITER_PROOF = 7
    CLUSTER = 8
    REFUSAL = 9


LARGEST: Mapping[Kind, int] = {
    Kind.HELLO: 32,
    Kind.OFFER: OFFER.size,
    Kind.JOINER_SHARE: pake.SHARE_BYTES,
    Kind.INVITER_SHARE: pake.SHARE_BYTES,
    Kind.JOINER_PROOF: pake.PROOF_BYTES,
    Kind.CARD: CARD.size + _MAX_NAME_BYTES + MAX_CERTIFICATE_BYTES + pake.SEAL_BYTES,
    Kind.INVITER_PROOF: pake.PROOF_BYTES,
    # Only this one is large, and it is awaited only of a device that proved to know the code.
    Kind.CLUSTER: MAX_ENCODED_BYTES + pake.SEAL_BYTES,
    Kind.REFUSAL: REFUSAL.size,
}
VARIABLE = frozenset({Kind.CARD, Kind.CLUSTER})


def encode_card(name: str, certificate: bytes, version: int) -> bytes:
    encoded = name.encode()
    return CARD.pack(version, len(encoded)) + encoded + certificate


def decode_card(card: bytes) -> tuple[str, bytes, int]:
    """Name, certificate, version. Raises PairingError; what they say is checked by ``Member``."""
    if len(card) < CARD.size:
        raise PairingError("the other device's card is cut short.")
    version, length = CARD.unpack_from(card)
    if version >= MAX_VERSION:
        raise PairingError("the other device's card has an absurd version.")
    try:
        name = card[CARD.size : CARD.size + length].decode()
    except UnicodeDecodeError as error:
        raise PairingError("the other device's name cannot be read.") from error
    return name, card[CARD.size + length :], version
