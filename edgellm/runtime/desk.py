"""The node's front desk: lets devices in by an invitation, and takes its owner's requests.

The owner is whoever has this device's own key: the commands of its home. Nobody else may open an
invitation here, put a device out, or have the node leave. All trust is in the ``TrustStore``;
who was put out is disconnected by whoever listens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.errors import EdgeError, PairingError, RemoteProtocolError
from edgellm.identity import Member, TrustStore
from edgellm.identity.invitation import MAX_WITHIN_S, WITHIN_S, Invitation, Reason
from edgellm.identity.refusals import RefusedError
from edgellm.runtime.pairing import serve_pairing
from edgellm.runtime.session import Session
from edgellm.transport.base import Stream
from edgellm.wire.messages import Message
from edgellm.wire.trust import (
    Forget,
    Forgot,
    InvitationNews,
    InvitationOpen,
    Leave,
    OpenInvitation,
)

INVITATION_S = WITHIN_S
WORDS_EVERY_S = 10.0
"""Attempts that say nothing new are told to people at most so often: anybody on the network can
make them."""

OnNews: TypeAlias = Callable[[InvitationNews], None]


@dataclass(slots=True)
class _Open:
    """The invitation that is open, and who wants to know of it."""

    invitation: Invitation
    request: int
    on_news: OnNews
    end: asyncio.TimerHandle


@dataclass(frozen=True, slots=True)
class Opened:
    """What to show to people."""

    code: str
    expires_s: float


class PairingDesk:
    """One a node. Use it in the event loop that it was made in."""

    def __init__(
        self,
        trust: TrustStore,
        name: str,
        *,
        on_inviting: Callable[[bool], None] = lambda is_open: None,
        on_notice: Callable[[str], None] = lambda notice: None,
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_inviting`` hears when an invitation opens and when none is open any more,
        ``on_notice`` what people should know, ``on_leave`` that the owner wants this node to hand
        over and end."""
        self._trust = trust
        self._name = name
        self._on_inviting = on_inviting
        self._on_notice = on_notice
        self._on_leave = on_leave
        self._loop = asyncio.get_running_loop()
        self._open: _Open | None = None
        self._quiet_until = 0.0

    # --- invitations ------------------------------------------------------------------

    def open(
        self,
        within_s: float = INVITATION_S,
        *,
        request: int = 0,
        on_news: OnNews = lambda news: None,
    ) -> Opened:
        """Let one more device in, for so long; an invitation that is open ends. Without a cluster,
        one is founded.

        ``on_news`` hears of every try that counts, and of the end. Raises DeviceError where the
        cluster cannot be written down, PairingError where this device was put out of it, UsageError
        for a time that is too long.
        """
        if self._trust.expelled:
            raise PairingError(
                "this device was put out of its cluster, so it can let nobody in.",
                hint="Have it invited again: edgellm invite on a device of the cluster.",
            )
        self._trust.found(self._name)
        now = self._loop.time()
        invitation = Invitation(now, within_s=within_s)
        self._end("another invitation was opened")
        expiry = self._loop.call_at(invitation.expires, self._expire)
        self._open = _Open(invitation, request, on_news, expiry)
        self._on_inviting(True)
        return Opened(invitation.code, invitation.expires_in(now))

    def withdraw(self) -> None:
        """Nobody is to join by the open invitation any more."""
        self._end("the invitation was withdrawn")

    def close(self) -> None:
        """The node ends."""
        self._end("this device's node has ended")

    def _expire(self) -> None:
        if self._open is not None:
            self._on_notice("The invitation is over: nobody has joined. A new one: edgellm invite")
        self._end("nobody has joined in time")

    def _end(self, problem: str, joined: Member | None = None) -> None:
        held, self._open = self._open, None
        if held is None:
            return
        held.end.cancel()
        self._on_inviting(False)
        if joined is not None:
            news = InvitationNews(held.request, True, joined.device_id, joined.name, "")
        else:
            news = InvitationNews(held.request, True, "", "", problem)
        held.on_news(news)

    async def on_stream(self, stream: Stream) -> None:
        """Serve a device that wants to join. Raises nothing."""
        held = self._open
        try:
            member = await serve_pairing(stream, self._trust, held.invitation if held else None)
        except PairingError as error:
            self._not_joined(held, error)
        else:
            self._on_notice(f"Device {member.name} belongs to the cluster now.")
            if held is not None and held is self._open:
                self._end("", member)

    def _not_joined(self, held: _Open | None, error: PairingError) -> None:
        reason = error.reason if isinstance(error, RefusedError) else None
        problem = error.message.rstrip(".")
        counts = reason in (Reason.WRONG_CODE, Reason.NOT_SAVED)
        if counts or self._loop.time() >= self._quiet_until:
            self._quiet_until = self._loop.time() + WORDS_EVERY_S
            self._on_notice(f"{problem[:1].upper()}{problem[1:]}.")
        if not counts or held is None or held is not self._open:
            return
        if held.invitation.closed(self._loop.time()):
            self._end(problem)
        else:
            held.on_news(InvitationNews(held.request, False, "", "", problem[:500]))

    # --- the owner's requests ---------------------------------------------------------

    def take(self, session: Session, message: Message) -> bool:
        """Take a message, if it is the owner's. Raises RemoteProtocolError when somebody else sent
        such a one."""
        if not isinstance(message, OpenInvitation | Forget | Leave):
            return False
        if session.peer.device_id != self._trust.identity.device_id:
            raise RemoteProtocolError(
                f"{type(message).__name__} came from another device; only this one's own commands"
                " may send it."
            )
        if isinstance(message, OpenInvitation):
            session.send(self._invite(session, message))
        elif isinstance(message, Forget):
            session.send(Forgot(message.request, self._forget(message.device_id)))
        else:
            self._on_leave()
        return True

    def _invite(self, session: Session, asked: OpenInvitation) -> InvitationOpen:
        if not asked.within_s:
            self.withdraw()
            return InvitationOpen(asked.request, "", 0.0, "")
        within_s = min(asked.within_s, MAX_WITHIN_S)
        try:
            opened = self.open(within_s, request=asked.request, on_news=session.send)
        except EdgeError as error:
            return InvitationOpen(asked.request, "", 0.0, str(error)[:500])
        return InvitationOpen(asked.request, opened.code, opened.expires_s, "")

    def _forget(self, device_id: str) -> str:
        try:
            self._trust.forget(device_id)
        except EdgeError as error:
            return str(error)[:500]
        return ""
