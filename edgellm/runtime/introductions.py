"""How trust spreads: the nodes of a cluster tell each other who belongs to it, and who no more.

Every node that we come to be connected with is told all records, and every change at once. A
record is taken only from a node of a trusted device, and merged as ``identity.members`` says;
whoever is forgotten is disconnected in the same turn of the event loop. Nothing here dials.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

from edgellm.errors import DeviceError, EdgeError, NotPairedError, PairingError, RemoteProtocolError
from edgellm.identity import Member, TrustStore
from edgellm.runtime.session import Session
from edgellm.wire.messages import Message
from edgellm.wire.trust import Introduce

REFRESH_INTERVAL_S = 1.0
"""How soon a change that another process of this home made counts here."""
_COME_BACK = (
    "To come back, run edgellm invite on another device, and edgellm join --code CODE on this one."
)


class Introductions:
    """One for all sessions of a node."""

    def __init__(
        self,
        trust: TrustStore,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_notice: Callable[[str], None] = lambda notice: None,
    ) -> None:
        """``on_change`` is called after somebody came or went, ``on_notice`` with what people
        should know of it."""
        self._trust = trust
        self._me = trust.identity.device_id
        self._on_change = on_change
        self._on_notice = on_notice
        self._known = trust.members
        self._sessions: set[Session] = set()
        self._teller: Session | None = None
        self._complaints: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stop_listening = trust.on_change(self._hear)
        self._refreshing = asyncio.create_task(self._refresh())
        if trust.expelled:
            self._on_notice(f"This device was put out of its cluster. {_COME_BACK}")

    def trusts(self, device_id: str) -> bool:
        """Whether to talk to a device. One that was itself put out belongs to nobody."""
        return device_id == self._me or (
            not self._trust.expelled and self._trust.trusted(device_id)
        )

    def opened(self, session: Session) -> None:
        """A session has greeted. It may have begun before its device was forgotten."""
        peer = session.peer
        if not self.trusts(peer.device_id):
            session.end(_not_ours(peer.name))
            return
        self._sessions.add(session)
        session.on_close(lambda reason: self._sessions.discard(session))
        if self._is_node(session):
            _tell(session, self._trust.members)

    def take(self, session: Session, message: Message) -> bool:
        """Take a record, if it is one. Raises RemoteProtocolError."""
        if not isinstance(message, Introduce):
            return False
        if not self._is_node(session) and session.peer.device_id != self._me:
            raise RemoteProtocolError("only nodes introduce devices.")
        if not self.trusts(session.peer.device_id) or self._is_known(message):
            return True
        if message.device_id == session.peer.device_id and not message.forgotten:
            # A device that was forgotten, here unheard of yet, must not let itself in again with a
            # newer record. Who let it in tells us.
            return True
        try:
            member = Member(
                message.device_id,
                message.name,
                bytes(message.payload),
                message.version,
                message.forgotten,
                message.introduced_by,
            )
        except PairingError as error:
            raise RemoteProtocolError(f"it introduced a device badly: {error.message}") from error
        self._teller = session
        try:
            self._trust.merge([member])
        except EdgeError as error:  # a full cluster, or a full disk: the peer cannot help it
            self._complain(f"Device {member.name} is not known here now: {error}")
        finally:
            self._teller = None
        return True

    async def close(self) -> None:
        """Take no more notice of changes."""
        self._stop_listening()
        self._refreshing.cancel()
        await asyncio.gather(self._refreshing, return_exceptions=True)

    # --- changes ----------------------------------------------------------------------

    def _hear(self) -> None:
        """From the store, in whatever thread: somebody was let in or put out, by whatever way."""
        if threading.get_ident() == self._thread:
            self._changed()
        else:
            self._loop.call_soon_threadsafe(self._changed)

    def _changed(self) -> None:
        before, self._known = self._known, self._trust.members
        news = [member for member in self._known if before.get(member.device_id) != member]
        for session in list(self._sessions):
            if session is not self._teller and self._is_node(session):
                _tell(session, news)
        for member in news:
            was = before.get(member.device_id)
            if self._teller is not None or member.device_id == self._me:
                self._announce(member, was is not None and not was.forgotten)
        for session in list(self._sessions):
            if not self.trusts(session.peer.device_id):
                session.end(_not_ours(session.peer.name))
        self._on_change()

    def _announce(self, member: Member, belonged: bool) -> None:
        by = self._known.get(member.introduced_by)
        who = by.name if by is not None else "another device"
        if member.forgotten and member.device_id == self._me:
            self._on_notice(f"{who} has put this device out of the cluster. {_COME_BACK}")
        elif member.forgotten and belonged:
            self._on_notice(
                f"Device {member.name} does not belong to the cluster any more:"
                f" {who} has put it out."
            )
        elif not member.forgotten and not belonged and member.device_id != self._me:
            self._on_notice(f"Device {member.name} belongs to the cluster now: {who} let it in.")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            try:
                self._trust.refresh()
            except DeviceError as error:
                self._complain(str(error))

    def _complain(self, words: str) -> None:
        if words not in self._complaints:
            self._complaints.add(words)
            self._on_notice(words)

    def _is_known(self, said: Introduce) -> bool:
        """Nearly everything said is; checking a certificate anew each time would be a waste."""
        known = self._trust.members.get(said.device_id)
        return known is not None and said == _introduction(known)

    def _is_node(self, session: Session) -> bool:
        """A node of another device; commands and clients do not count starts."""
        return session.peer.boot > 0 and session.peer.device_id != self._me


def _introduction(member: Member) -> Introduce:
    return Introduce(
        member.device_id,
        member.name,
        member.version,
        member.forgotten,
        member.introduced_by or member.device_id,
        member.certificate,
    )


def _tell(session: Session, members: Iterable[Member]) -> None:
    for member in members:
        session.send(_introduction(member))


def _not_ours(name: str) -> NotPairedError:
    return NotPairedError(f"device {name} does not belong to this cluster any more.")
