"""Devices for the tests of trust: homes with identities, and two sides of a pairing by wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.identity.device import Identity, make_identity, save_identity
from edgellm.identity.invitation import Invitation
from edgellm.identity.pairing import Inviter, Joiner
from edgellm.identity.trust import TrustStore

CODE = "12345678"
NOW = 1000.0

Change = Callable[[bytes], bytes]


def as_sent(data: bytes) -> bytes:
    return data


def device(home: Path, identity: Identity | None = None) -> TrustStore:
    """The trust store of a new device that lives in ``home``."""
    made = identity or make_identity()
    save_identity(home, made)
    return TrustStore(home, made)


def founder(home: Path, name: str = "anna") -> TrustStore:
    store = device(home)
    store.found(name)
    return store


@dataclass
class Wire:
    """Carries an exchange to its end, and keeps what was said: lists of pieces by sender."""

    joiner_said: list[bytes] = field(default_factory=list)
    inviter_said: list[bytes] = field(default_factory=list)
    to_inviter: Change = as_sent
    to_joiner: Change = as_sent

    def run(self, joiner: Joiner, inviter: Inviter, now: float = NOW) -> None:
        said = joiner.start()
        while said:
            self.joiner_said.append(said)
            answer = inviter.receive(self.to_inviter(said), now)
            if not answer:
                break
            self.inviter_said.append(answer)
            said = joiner.receive(self.to_joiner(answer), now)
        for side in (joiner, inviter):
            side.close()


def pair(
    joining: TrustStore, inviting: TrustStore, invitation: Invitation | None = None
) -> tuple[Joiner, Inviter]:
    """Both sides after an undisturbed exchange with the right code; nothing adopted yet."""
    invitation = invitation or Invitation(NOW, code=CODE)
    joiner = Joiner(joining, "bert", invitation.code, NOW)
    inviter = Inviter(inviting, invitation, NOW)
    Wire().run(joiner, inviter)
    return joiner, inviter
