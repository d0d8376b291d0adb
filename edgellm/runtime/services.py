"""What every end of a session does for the other one, whatever else it is there for.

A node's worker and a client's coordinator both pass on what they do not know themselves:
questions for tensors, echoes that measure a link, who else is there. One object an end, for all
of its sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Protocol, TypeAlias

from edgellm.errors import EdgeError
from edgellm.runtime.exchange import TensorExchange
from edgellm.runtime.links import LinkFigures, LinkMeter
from edgellm.runtime.session import Session
from edgellm.wire.messages import (
    Echo,
    EchoBack,
    KnownPeers,
    LinkMeasured,
    MeasureLink,
    Message,
    PeerAddress,
    QueryPeers,
)

FRESH_S = 600.0
"""How long a measured link counts."""
MAX_MEASURING = 8
"""Links that are measured for others at once; more are refused."""


Taker: TypeAlias = Callable[[Session, Message], bool]
"""Takes a message, if it is for it. Raises RemoteProtocolError."""


class Directory(Protocol):
    """Who else is there: ``runtime.neighbours``."""

    def known(self) -> tuple[PeerAddress, ...]: ...
    def on_known_peers(self, session: Session, message: KnownPeers) -> None: ...


class Services:
    """See the module."""

    def __init__(
        self,
        exchange: TensorExchange,
        dial: Callable[[PeerAddress], Awaitable[Session]],
        directory: Directory | None = None,
        takers: Sequence[Taker] = (),
        links: LinkMeter | None = None,
    ) -> None:
        """``takers`` are asked in turn about what nobody here takes; ``links`` measures with
        whatever echoes come back."""
        self.exchange = exchange
        self.links = links or LinkMeter()
        self._dial = dial
        self._directory = directory
        self._takers = takers
        self._measured: dict[str, tuple[float, LinkFigures]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, session: Session, message: Message) -> bool:
        """Take a message, if it is for us. Raises RemoteProtocolError."""
        if self.exchange.take(session, message):
            return True
        if isinstance(message, Echo):
            session.send(EchoBack(message.nonce))
        elif isinstance(message, EchoBack):
            self.links.on_echo_back(message)
        elif isinstance(message, MeasureLink):
            if len(self._tasks) < MAX_MEASURING:
                self._spawn(self._measure(session, message))
            else:
                busy = "it measures other links already"
                session.send(LinkMeasured(message.request, 0.0, 0.0, busy))
        elif isinstance(message, QueryPeers):
            session.send(KnownPeers(self._directory.known() if self._directory else ()))
        elif isinstance(message, KnownPeers):
            if self._directory is not None:
                self._directory.on_known_peers(session, message)
        else:
            return any(take(session, message) for take in self._takers)
        return True

    async def _measure(self, session: Session, asked: MeasureLink) -> None:
        """Measure the link from here to ``asked.peer`` for a coordinator."""
        try:
            found = await self.link_to(asked.peer)
        except EdgeError as error:
            session.send(LinkMeasured(asked.request, 0.0, 0.0, str(error)[:200]))
        else:
            answer = LinkMeasured(asked.request, found.round_trip_s, found.bytes_per_s, "")
            session.send(answer)

    async def link_to(self, peer: PeerAddress) -> LinkFigures:
        """The link from here to another device: measured lately, or now. Raises EdgeError."""
        now = asyncio.get_running_loop().time()
        known = self._measured.get(peer.device_id)
        if known is not None and now - known[0] < FRESH_S:
            return known[1]
        session = await self._dial(peer)
        try:
            found = await self.links.measure(session)
        finally:
            await session.close()
        self._measured[peer.device_id] = (now, found)
        return found

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def closed(self, session: Session) -> None:
        self.exchange.closed(session)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.exchange.close()
