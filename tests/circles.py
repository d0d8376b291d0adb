"""Devices for tests of TLS: identities that are made once, and who trusts whom, without files."""

from __future__ import annotations

import functools

from edgellm.identity import Identity, make_identity
from edgellm.identity.tls import Credentials


@functools.cache
def device(name: str) -> Identity:
    """The identity of a device of this name, the same in the whole run."""
    del name
    return make_identity()


class Circle:
    """A device and those that it trusts, to be changed at will."""

    def __init__(self, owner: Identity, *trusted: Identity) -> None:
        self.owner = owner
        self.trusted = {each.device_id: each.certificate for each in trusted}
        self.credentials = Credentials(owner, lambda: self.trusted)

    def forget(self, other: Identity) -> None:
        self.trusted = {k: v for k, v in self.trusted.items() if k != other.device_id}
