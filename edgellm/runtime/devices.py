"""The devices that a coordinator is connected to: reached, asked what they are, told apart by name.

Nothing is loaded here, and nothing is decided about plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from edgellm.errors import PeerLostError, RemoteProtocolError, UsageError
from edgellm.runtime.peers import Link, Peer
from edgellm.runtime.questions import Questions
from edgellm.runtime.reach import reach
from edgellm.runtime.session import Session
from edgellm.transport.base import Transport
from edgellm.wire.messages import DeviceInfo, PeerAddress


class Dial(Protocol):
    """Connects and greets, the usual way or ``via`` another transport. Raises EdgeError."""

    async def __call__(self, host: str, port: int, via: Transport | None = None) -> Session: ...


class Devices:
    """See the module."""

    def __init__(self, dial: Dial, questions: Questions) -> None:
        self.by_name: dict[str, Peer] = {}
        """In the order they were connected."""
        self._dial = dial
        self._questions = questions

    async def connect(
        self, host: str, port: int, *, via: Transport | None = None, how: str = ""
    ) -> Peer:
        """Connect to the device that others reach at ``host:port`` and ask what it is.

        ``via`` is a shorter way for us alone: to the node in our own process. Raises PeerLostError,
        RemoteProtocolError for a device that says two things of itself.
        """
        session = await self._dial(host, port, via)
        return await self._adopt(session, host, port, how)

    async def connect_to(
        self, device_id: str, addresses: Sequence[tuple[str, int]], *, how: str = ""
    ) -> Peer:
        """Connect to a device that may be at any of ``addresses``, the likeliest first.

        Raises PeerLostError where it is not.
        """
        answer = await reach(self._dial, addresses, device_id)
        return await self._adopt(answer.session, *answer.address, how)

    async def _adopt(self, session: Session, host: str, port: int, how: str) -> Peer:
        try:
            peer = self._admit(Peer(await self._ask(session), host, port, session, how))
        except BaseException:
            await session.close()
            raise
        if peer.session is not session:
            await session.close()
        return peer

    async def refresh(self, peer: Peer) -> Peer:
        """The device with what it says of itself now. Raises PeerLostError."""
        fresh = self.by_name[peer.info.name] = await self.ask(peer)
        return fresh

    async def ask(self, peer: Peer) -> Peer:
        """The same, but what is known of it here stays as it is."""
        info = dataclasses.replace(await self._ask(peer.session), name=peer.info.name)
        return dataclasses.replace(peer, info=info)

    async def measure_link(self, source: Peer, target: Peer) -> Link:
        """Have ``source`` measure its link to ``target``. Raises PeerLostError."""
        info = target.info
        where = PeerAddress(info.device_id, info.name, target.host, target.port)
        found = await self._questions.link(source.session, where)
        return Link(
            source.info.name, info.name, found.round_trip_s, found.bytes_per_s, found.problem
        )

    async def _ask(self, session: Session) -> DeviceInfo:
        info = await self._questions.device(session)
        greeted = session.peer
        if (info.name, info.device_id) != (greeted.name, greeted.device_id):
            raise RemoteProtocolError(
                f"{session.address} greeted as {greeted.name} and then says it is {info.name},"
                " or gives another device id."
            )
        if session.ended:  # between its answer and now
            raise PeerLostError(f"{session.address} hung up.")
        return info

    def _admit(self, peer: Peer) -> Peer:
        """``peer``, or the same device as it is connected already.

        Plans name devices, so a second device of one name is told apart by a part of its id.
        """
        for known in self.by_name.values():
            if known.info.device_id == peer.info.device_id:
                return known
        if peer.info.name in self.by_name:
            name = f"{peer.info.name[:59]}-{peer.info.device_id[:4]}"
            peer = dataclasses.replace(peer, info=dataclasses.replace(peer.info, name=name))
        if peer.info.name in self.by_name:
            raise UsageError(
                f"two devices are named {peer.info.name}.", hint="Give one of them another --name."
            )
        self.by_name[peer.info.name] = peer
        return peer

    def name_of(self, session: Session) -> str:
        """The name that plans have for the device at the other end."""
        names = (name for name, peer in self.by_name.items() if peer.session is session)
        return next(names, session.peer.name)

    def lost(self, session: Session) -> str | None:
        """This session has ended: the name of the device that is gone with it, if one is."""
        # By its session: what it called itself is only its word.
        name = next((n for n, peer in self.by_name.items() if peer.session is session), None)
        if name is not None:
            del self.by_name[name]
        return name
