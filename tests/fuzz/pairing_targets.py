"""The fuzz targets of pairing: what a stranger says to a device that invites, or to one that joins.

A stranger can say the first messages as well as anybody; everything after them needs the code, so
an input is valid here while the device still waits for more.
"""

from __future__ import annotations

import functools
from pathlib import Path

from edgellm.errors import PairingError
from edgellm.identity.invitation import Invitation
from edgellm.identity.pairing import Inviter, Joiner
from edgellm.identity.trust import TrustStore
from tests.fuzz.driver import Target
from tests.pairs import CODE, NOW, device, founder


@functools.cache
def _stores(folder: Path) -> tuple[TrustStore, TrustStore]:
    return founder(folder / "inviting"), device(folder / "joining")


def _said(folder: Path) -> tuple[bytes, bytes]:
    """What the joiner says up to its proof, and the inviter up to its share."""
    inviting, joining = _stores(folder)
    inviter = Inviter(inviting, Invitation(NOW, code=CODE), NOW)
    joiner = Joiner(joining, "bert", CODE, NOW)
    hello = joiner.start()
    offer = inviter.receive(hello, NOW)
    share = joiner.receive(offer, NOW)
    return hello + share, offer + inviter.receive(share, NOW)


def _to_inviter(data: bytes, folder: Path) -> bool:
    inviting, joining = _stores(folder)
    inviter = Inviter(inviting, Invitation(NOW, code=CODE), NOW)
    inviter.receive(data, NOW)
    if inviting.trusted(joining.identity.device_id):
        raise AssertionError("somebody was let in")
    return not inviter.finished


def _to_joiner(data: bytes, folder: Path) -> bool:
    _, joining = _stores(folder)
    joiner = Joiner(joining, "bert", CODE, NOW)
    joiner.start()
    joiner.receive(data, NOW)
    try:
        joiner.result  # noqa: B018 - it raises
    except PairingError:
        return not joiner.finished
    raise AssertionError("a cluster was joined")


TARGETS = (
    Target("inviter", lambda folder: [_said(folder)[0]], _to_inviter),
    Target("joiner", lambda folder: [_said(folder)[1][:53]], _to_joiner),
)
