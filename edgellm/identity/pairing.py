"""How two devices come to trust each other by a short code: two state machines, no I/O.

May import ``errors``, ``settings`` and this package. Bytes in, bytes out; time is an argument. The
one effect is ``TrustStore.add``, on the inviter's side, at the one place where it has to happen. An
exchange:

    joiner    EGP1, HELLO         its device id
    inviter   OFFER               its device id, its cluster's id      (or a REFUSAL, at any point)
    joiner    JOINER_SHARE        SPAKE2
    inviter   INVITER_SHARE       SPAKE2
    joiner    JOINER_PROOF        that it has the key; a wrong one burns a try
              CARD, sealed        its certificate and name
    inviter   INVITER_PROOF       sent after the joiner was pinned
              CLUSTER, sealed     cluster id and all members, both devices included

The joiner proves itself first: up to its proof an inviter has sent one random-looking point, which
is equally likely under every code, so whoever gives up before the proof learned nothing and need
not cost a try. With the proof it tells which one code it tried, and only then is it answered.

If the connection breaks after the joiner was pinned, the inviter trusts a device that proved to
know the code and that does not trust it back yet: of no use to either. A new invitation heals it.

Everything said, by whom and in which order, goes into the keys, the proofs and the seals.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from edgellm.errors import EdgeError, PairingError, UsageError
from edgellm.identity import pake
from edgellm.identity.certificates import device_id_of
from edgellm.identity.frames import (
    HEADER,
    LARGEST,
    MAGIC,
    OFFER,
    REFUSAL,
    VARIABLE,
    Kind,
    decode_card,
    encode_card,
)
from edgellm.identity.invitation import ATTEMPT_S, Attempt, Invitation, Reason, check_code
from edgellm.identity.members import Member, Members, decode_cluster, encode_cluster
from edgellm.identity.refusals import refused
from edgellm.identity.trust import TrustStore
from edgellm.settings import is_name

__all__ = ["MAGIC", "Inviter", "Joined", "Joiner", "Kind"]

_REASONS = {int(reason): reason for reason in Reason}


class _StopError(Exception):
    """Ends the exchange here, and tells the other side why."""

    def __init__(self, reason: Reason, tries_left: int = 0, why: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.tries_left = tries_left
        self.why = why


class _Side:
    """What both sides share. ``receive`` never raises; how it ended is in ``result``."""

    _joins: ClassVar[bool]

    def __init__(self, now: float, expected: Kind) -> None:
        self.deadline = now + ATTEMPT_S
        """Call ``receive(b"", now)`` then, if the other side said nothing."""
        self.finished = False
        """Send what ``receive`` returned last, then close the connection."""
        self._error: PairingError | None = None
        self._expected = expected
        self._buffer = bytearray()
        self._transcript = hashlib.sha256(MAGIC)
        self._before = b""
        self._out = bytearray()

    def receive(self, data: bytes, now: float) -> bytes:
        """What to send in answer to these bytes, which may be any piece of a stream.

        At most one frame is kept, of a size that its kind allows. Bytes after the end are ignored.
        """
        if self.finished:
            return b""
        self._buffer += data
        try:
            if now >= self.deadline:
                raise _StopError(Reason.LATE)
            while self._take_frame(now):  # an end leaves nothing to take
                pass
        except _StopError as error:
            self._end(refused(error.reason, error.tries_left, error.why, joining=self._joins))
            self._send(Kind.REFUSAL, REFUSAL.pack(error.reason, max(0, error.tries_left)))
        out = bytes(self._out)
        self._out.clear()
        return out

    def close(self) -> None:
        """The other side ended the connection."""
        if not self.finished:
            self._end(PairingError("the other device ended the connection.", hint="Try again."))

    def _end(self, error: PairingError | None = None) -> None:
        self.finished = True
        self._error = error
        self._buffer.clear()

    def _take_frame(self, now: float) -> bool:
        if len(self._buffer) < HEADER.size:
            return False
        number, length = HEADER.unpack_from(self._buffer)
        if number not in (self._expected, Kind.REFUSAL):
            raise _StopError(Reason.BROKEN)
        kind = Kind(number)
        largest = LARGEST[kind]
        if length > largest or (kind not in VARIABLE and length != largest):
            raise _StopError(Reason.BROKEN)
        end = HEADER.size + length
        if len(self._buffer) < end:
            return False
        frame = bytes(self._buffer[:end])
        del self._buffer[:end]
        body = frame[HEADER.size :]
        if kind is Kind.REFUSAL:
            self._hear_refusal(body)
            return False
        self._before = self._transcript.digest()
        self._said(frame, by_joiner=not self._joins)
        try:
            self._take(kind, body, now)
        except PairingError as error:  # of a check further down
            raise _StopError(Reason.BROKEN, why=error.message) from error
        return True

    def _take(self, kind: Kind, body: bytes, now: float) -> None:
        raise NotImplementedError

    def _hear_refusal(self, body: bytes) -> None:
        number, tries_left = REFUSAL.unpack(body)
        reason = _REASONS.get(number, Reason.BROKEN)
        self._end(refused(reason, tries_left, "", joining=self._joins))

    def _send(self, kind: Kind, body: bytes) -> None:
        frame = HEADER.pack(kind, len(body)) + body
        self._said(frame, by_joiner=self._joins)
        self._out += frame

    def _said(self, frame: bytes, *, by_joiner: bool) -> None:
        self._transcript.update((b"J" if by_joiner else b"I") + frame)

    @property
    def _now_said(self) -> bytes:
        return self._transcript.digest()


class Inviter(_Side):
    """The side whose screen shows the code: one for each connection that begins with ``EGP1``."""

    _joins = False

    def __init__(self, trust: TrustStore, invitation: Invitation | None, now: float) -> None:
        """``invitation``: shared by all connections; None refuses in words.

        Raises UsageError for an invitation into no cluster: ``trust.found`` comes first.
        """
        super().__init__(now, Kind.HELLO)
        if invitation is not None and not trust.cluster_id:
            raise UsageError("this device belongs to no cluster that another could join.")
        self._trust = trust
        self._invitation = invitation
        self._magic = False
        self._joiner = ""
        self._attempt: Attempt | None = None
        self._keys: pake.Keys | None = None
        self._admitted: Member | None = None

    @property
    def result(self) -> Member:
        """Who was let in, already in the trust store. Raises PairingError if nobody (yet)."""
        if self._admitted is None:
            raise self._error or PairingError("the devices are not paired yet.")
        return self._admitted

    def _take_frame(self, now: float) -> bool:
        if not self._magic:
            if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
                raise _StopError(Reason.BROKEN)
            if len(self._buffer) < len(MAGIC):
                return False
            del self._buffer[: len(MAGIC)]
            self._magic = True
        return super()._take_frame(now)

    def _take(self, kind: Kind, body: bytes, now: float) -> None:
        invitation = self._open_invitation(now)
        match kind:
            case Kind.HELLO:
                self._offer(body)
            case Kind.JOINER_SHARE:
                self._share(body, invitation, now)
            case Kind.JOINER_PROOF:
                self._check_proof(body, invitation, now)
            case _:
                self._admit(body, invitation)

    def _open_invitation(self, now: float) -> Invitation:
        """Looked at for each frame: of several attempts under way one may have closed it."""
        if self._invitation is None:
            raise _StopError(Reason.NO_INVITATION)
        closed = self._invitation.closed(now)
        if closed is not None:
            raise _StopError(closed)
        return self._invitation

    def _offer(self, body: bytes) -> None:
        self._joiner = body.hex()
        own = self._trust.identity.device_id
        if self._joiner == own:
            raise _StopError(Reason.ITSELF)
        cluster = bytes.fromhex(self._trust.cluster_id)
        self._send(Kind.OFFER, OFFER.pack(bytes.fromhex(own), cluster))
        self._expected = Kind.JOINER_SHARE

    def _share(self, share: bytes, invitation: Invitation, now: float) -> None:
        self._attempt = invitation.begin(now)
        if self._attempt is None:
            raise _StopError(Reason.BUSY)
        own = self._trust.identity.device_id
        exchange = pake.Exchange(invitation.code, joiner=self._joiner, inviter=own, joins=False)
        self._send(Kind.INVITER_SHARE, exchange.share)
        self._keys = exchange.finish(share, self._now_said)
        self._expected = Kind.JOINER_PROOF

    def _check_proof(self, proof: bytes, invitation: Invitation, now: float) -> None:
        if self._keys is None or self._attempt is None:
            raise _StopError(Reason.BROKEN)
        if not self._attempt.live:
            raise _StopError(Reason.BUSY)
        if not pake.proves(self._keys.joiner_proof, self._before, proof):
            invitation.burn()
            raise _StopError(Reason.WRONG_CODE, invitation.tries_left)
        self._expected = Kind.CARD

    def _admit(self, sealed: bytes, invitation: Invitation) -> None:
        if self._keys is None:
            raise _StopError(Reason.BROKEN)
        card = pake.unseal(self._keys.joiner_seal, self._before, sealed)
        name, certificate, version = decode_card(card)
        if device_id_of(certificate) != self._joiner:
            raise PairingError("the other device's certificate is not its own.")
        try:
            self._admitted = self._trust.add(self._joiner, name, certificate, above=version)
        except EdgeError as error:  # the disk is full, or the cluster: the invitation stays open
            raise _StopError(Reason.NOT_SAVED, why=error.message) from error
        invitation.use(self._joiner)
        self._send(Kind.INVITER_PROOF, pake.prove(self._keys.inviter_proof, self._now_said))
        cluster = encode_cluster(self._trust.cluster_id, self._trust.members)
        self._send(Kind.CLUSTER, pake.seal(self._keys.inviter_seal, self._now_said, cluster))
        self._end()


@dataclass(frozen=True, slots=True)
class Joined:
    """What a joiner came home with. Nothing of it is pinned before ``adopt``."""

    cluster_id: str
    members: Members
    inviter: Member

    def adopt(self, trust: TrustStore) -> None:
        """Write it down. Raises DeviceError where that fails; then join again."""
        trust.adopt(self.cluster_id, self.members, introducer=self.inviter.device_id)


class Joiner(_Side):
    """The side where the code is typed."""

    _joins = True

    def __init__(
        self, trust: TrustStore, name: str, code: str, now: float, *, inviter_id: str = ""
    ) -> None:
        """``name``: what this device is called. ``inviter_id``: which device to expect; empty: any.

        Raises PairingError for what cannot be a code, UsageError for what cannot be a name.
        """
        if not is_name(name):
            raise UsageError(f"{name[:80]!r} cannot be a device's name.")
        super().__init__(now, Kind.OFFER)
        self._trust = trust
        self._name = name
        self._code = check_code(code)
        self._wanted = inviter_id
        self._inviter = ""
        self._cluster_id = ""
        self._exchange: pake.Exchange | None = None
        self._keys: pake.Keys | None = None
        self._joined: Joined | None = None

    def start(self) -> bytes:
        """What to send first. It says who we are, and nothing of the code."""
        self._send(Kind.HELLO, bytes.fromhex(self._trust.identity.device_id))
        out = MAGIC + bytes(self._out)
        self._out.clear()
        return out

    @property
    def result(self) -> Joined:
        """The cluster, not yet in the trust store. Raises PairingError if there is none (yet)."""
        if self._joined is None:
            raise self._error or PairingError("the devices are not paired yet.")
        return self._joined

    def _take(self, kind: Kind, body: bytes, now: float) -> None:
        match kind:
            case Kind.OFFER:
                self._share(body)
            case Kind.INVITER_SHARE:
                self._prove(body)
            case Kind.INVITER_PROOF:
                self._check_proof(body)
            case _:
                self._join(body)

    def _share(self, body: bytes) -> None:
        inviter, cluster = OFFER.unpack(body)
        self._inviter, self._cluster_id = inviter.hex(), cluster.hex()
        own = self._trust.identity.device_id
        if self._inviter == own:
            raise _StopError(Reason.ITSELF)
        # A member whom its cluster lost, or forgot, may come back to it; nobody may be in two. The
        # offer is proven only later, but a lie in it can only make us refuse, or fail then.
        if self._trust.settled and self._trust.cluster_id != self._cluster_id:
            raise _StopError(Reason.OTHER_CLUSTER)
        if self._wanted and self._inviter != self._wanted:
            raise _StopError(Reason.UNPROVEN)
        self._exchange = pake.Exchange(self._code, joiner=own, inviter=self._inviter, joins=True)
        self._send(Kind.JOINER_SHARE, self._exchange.share)
        self._expected = Kind.INVITER_SHARE

    def _prove(self, share: bytes) -> None:
        if self._exchange is None:
            raise _StopError(Reason.BROKEN)
        self._keys = self._exchange.finish(share, self._now_said)
        self._send(Kind.JOINER_PROOF, pake.prove(self._keys.joiner_proof, self._now_said))
        me = self._trust.identity
        known = self._trust.members.get(me.device_id)
        card = encode_card(self._name, me.certificate, known.version if known else 0)
        self._send(Kind.CARD, pake.seal(self._keys.joiner_seal, self._now_said, card))
        self._expected = Kind.INVITER_PROOF

    def _check_proof(self, proof: bytes) -> None:
        if self._keys is None or not pake.proves(self._keys.inviter_proof, self._before, proof):
            raise _StopError(Reason.UNPROVEN)
        self._expected = Kind.CLUSTER

    def _join(self, sealed: bytes) -> None:
        if self._keys is None:
            raise _StopError(Reason.BROKEN)
        text = pake.unseal(self._keys.inviter_seal, self._before, sealed)
        cluster_id, members = decode_cluster(text)
        inviter = members.get(self._inviter)
        if cluster_id != self._cluster_id or inviter is None or inviter.forgotten:
            raise PairingError("the cluster is not the one that was offered.")
        if not members.trusted(self._trust.identity.device_id):
            raise PairingError("the cluster does not have this device in it.")
        self._joined = Joined(cluster_id, members, inviter)
        self._end()
