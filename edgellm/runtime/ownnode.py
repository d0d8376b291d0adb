"""A command's conversation with the node of its own device, which runs in another process.

The node takes these requests from nobody else: it knows the command by the device's own
certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import TypeVar

from edgellm.discovery.addresses import Address
from edgellm.errors import DeadlineError, PairingError, PeerLostError, RemoteProtocolError
from edgellm.runtime.questions import ANSWER_WITHIN_S
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.base import Transport
from edgellm.wire.frames import Frame
from edgellm.wire.messages import KnownPeers, Message, QueryPeers
from edgellm.wire.trust import (
    Forget,
    Forgot,
    InvitationNews,
    InvitationOpen,
    Leave,
    OpenInvitation,
)

_Answer = TypeVar("_Answer", InvitationOpen, InvitationNews, Forgot, KnownPeers)
_Heard = TypeVar("_Heard")
_ENDED = "this device's node has ended."


class OwnNode:
    """Made by ``own_node``. One request at a time."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._ended = asyncio.Event()
        self._numbers = itertools.count(1)
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._news: asyncio.Queue[InvitationNews] = asyncio.Queue()

    @property
    def name(self) -> str:
        """What the node calls this device."""
        return self._open_session().peer.name

    async def invite(self, within_s: float) -> InvitationOpen:
        """Have one more device let in for ``within_s`` seconds. Raises PairingError where the node
        cannot, PeerLostError."""
        question = OpenInvitation(next(self._numbers), within_s)
        answer = await self._ask(question, InvitationOpen)
        if answer.problem:
            raise PairingError(answer.problem)
        return answer

    async def withdraw(self) -> None:
        """Nobody is to join by the open invitation any more. Waits until that is so."""
        await self._ask(OpenInvitation(next(self._numbers), 0.0), InvitationOpen)

    async def news(self) -> InvitationNews:
        """What became of the invitation, as soon as there is something. Raises PeerLostError."""
        return await self._next(self._news)

    async def forget(self, device_id: str) -> None:
        """Raises PairingError with what the node says against it, PeerLostError."""
        answer = await self._ask(Forget(next(self._numbers), device_id), Forgot)
        if answer.problem:
            raise PairingError(answer.problem)

    async def addresses(self) -> tuple[Address, ...]:
        """Where the node can be reached, the likeliest first."""
        own = self._open_session().peer.device_id
        told = await self._ask(QueryPeers(), KnownPeers)
        return tuple((peer.host, peer.port) for peer in told.peers if peer.device_id == own)

    async def leave(self, within_s: float) -> None:
        """Have the node hand over what it holds, and wait until it has ended. Raises
        DeadlineError."""
        self._open_session().send(Leave(next(self._numbers)))
        try:
            async with asyncio.timeout(within_s):
                await self._ended.wait()
        except TimeoutError as error:
            raise DeadlineError(
                f"this device's node has not ended within {within_s:g} s.",
                hint="Ask again, or stop it where it runs.",
            ) from error

    async def _ask(self, question: Message, kind: type[_Answer]) -> _Answer:
        self._open_session().send(question)
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                while True:
                    answer = await self._next(self._answers)
                    if isinstance(answer, kind):
                        return answer
        except TimeoutError as error:
            raise DeadlineError("this device's node did not answer in time.") from error

    async def _next(self, queue: asyncio.Queue[_Heard]) -> _Heard:
        """The next of ``queue``, or what is left of it when the node has ended."""
        getting, ended = asyncio.create_task(queue.get()), asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((getting, ended), return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
        finally:
            getting.cancel()
            ended.cancel()
        raise PeerLostError(_ENDED)

    def _open_session(self) -> Session:
        if self._session is None or self._session.ended:
            raise PeerLostError(_ENDED)
        return self._session

    # --- SessionHandler ---------------------------------------------------------------

    def on_frame(self, session: Session, frame: Frame) -> None:
        raise RemoteProtocolError("this device's node sent a command rows of a model.")

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        if isinstance(message, InvitationNews):
            self._news.put_nowait(message)
        elif isinstance(message, InvitationOpen | Forgot | KnownPeers):
            self._answers.put_nowait(message)
        # A node also tells of the cluster what commands do not ask for.

    def on_session_closed(self, session: Session) -> None:
        self._ended.set()

    async def connect(self, transport: Transport, address: Address, me: Introduction) -> None:
        self._session = await Session.dial(transport, *address, me, self)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


@contextlib.asynccontextmanager
async def own_node(
    transport: Transport, address: Address, me: Introduction
) -> AsyncIterator[OwnNode]:
    """The node at ``address``, which must be that of ``me``. Raises PeerLostError, NotPairedError
    for one of another device."""
    node = OwnNode()
    try:
        await node.connect(transport, address, me)
        yield node
    finally:
        await node.close()
