"""Who this device is, whom it trusts, and how two devices come to trust each other.

Layer 1: may import ``errors``, ``types`` and ``settings``. ``certificates`` and ``members`` do no
I/O; ``device`` and ``trust`` keep small files; ``tls`` makes contexts; ``invitation``, ``pake``,
``frames`` and ``refusals`` are what ``pairing`` is made of, which is bytes in, bytes out.
"""

from __future__ import annotations

from edgellm.identity.device import (
    Identity,
    check_certificate,
    device_id_of,
    is_device_id,
    load_identity,
    make_identity,
    next_boot,
    save_identity,
)
from edgellm.identity.members import MAX_MEMBERS, Member, Members
from edgellm.identity.trust import TrustStore

__all__ = [
    "MAX_MEMBERS",
    "Identity",
    "Member",
    "Members",
    "TrustStore",
    "check_certificate",
    "device_id_of",
    "is_device_id",
    "load_identity",
    "make_identity",
    "next_boot",
    "save_identity",
]
