"""One open connection to another device: the glue between a stream, its state machine and us.

It decides nothing: bytes go into ``wire.Connection``, its events go to one handler, in order and
in the turn of the event loop that they arrived in. Handlers therefore never wait. Whatever ends a
session is told to everyone who asked with ``on_close``, once, as a reason in words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.errors import EdgeError, PeerLostError, RemoteProtocolError, error_from_dict
from edgellm.transport.base import Stream, Transport
from edgellm.wire.connection import (
    CONNECTION,
    Closed,
    Connection,
    Event,
    FrameReceived,
    MessageReceived,
    Opened,
    Role,
    State,
    Timeouts,
)
from edgellm.wire.frames import Buffer, Frame
from edgellm.wire.messages import (
    DEFAULT_PAYLOAD_LIMITS,
    NO_SEQUENCE,
    ErrorReport,
    Hello,
    Hidden,
    Message,
    Step,
    Welcome,
    kind_of,
)

ROUTED_KINDS = frozenset((kind_of(Step), kind_of(Hidden)))
"""Frames that a node passes on without decoding."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What this side says of itself in a handshake."""

    name: str
    device_id: str
    software: str
    boot: int = 0
    """See ``Hello``."""


class SessionHandler(Protocol):
    """Takes what a session receives, without waiting. Raising EdgeError ends the session."""

    def on_frame(self, session: Session, frame: Frame) -> None:
        """A frame of ``ROUTED_KINDS``."""

    def on_message(self, session: Session, message: Message, frame: Frame) -> None: ...

    def on_session_closed(self, session: Session) -> None: ...


@dataclass(slots=True)
class Traffic:
    """What went over one connection, both ways, frames and their bytes."""

    sent_bytes: int = 0
    sent_messages: int = 0
    received_bytes: int = 0
    received_messages: int = 0


class Session:
    """See the module. Made by ``dial``, or served by ``accept``."""

    def __init__(self, stream: Stream, connection: Connection, handler: SessionHandler) -> None:
        self.traffic = Traffic()
        self._stream = stream
        self._connection = connection
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[Hello | Welcome] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._on_close: list[Callable[[str], None]] = []
        self._told_open: Callable[[Session], None] = lambda session: None
        self._reason: EdgeError | None = None
        self._limits: dict[int, int] = dict(DEFAULT_PAYLOAD_LIMITS)
        self._ended = False

    @classmethod
    async def dial(
        cls,
        transport: Transport,
        host: str,
        port: int,
        me: Introduction,
        handler: SessionHandler,
        *,
        within_s: float = 5.0,
        timeouts: Timeouts | None = None,
    ) -> Session:
        """Connect and greet. Raises PeerLostError, or what the peer said against us."""
        stream = await transport.dial(host, port, within_s)
        session = cls(stream, _connection(Role.DIALER, me, timeouts), handler)
        session._write(session._connection.start(session._loop.time()))
        session._begin()
        try:
            await session._opened
        except BaseException:
            await session.close()
            raise
        return session

    @classmethod
    async def accept(
        cls,
        stream: Stream,
        me: Introduction,
        handler: SessionHandler,
        *,
        timeouts: Timeouts | None = None,
        on_open: Callable[[Session], None] = lambda session: None,
    ) -> None:
        """Serve an accepted stream until it ends; ``on_open`` is told when it has greeted."""
        session = cls(stream, _connection(Role.LISTENER, me, timeouts), handler)
        session._told_open = on_open
        session._begin()
        try:
            await stream.wait_closed()
        finally:
            session._finish()

    @property
    def peer(self) -> Hello | Welcome:
        """What the other side said of itself; there from the moment the session is open."""
        return self._opened.result()

    @property
    def address(self) -> str:
        return self._stream.peername

    @property
    def local(self) -> bool:
        """Whether the peer is on this machine."""
        return self._stream.local

    @property
    def round_trip_s(self) -> float | None:
        return self._connection.round_trip_s

    @property
    def heard_at(self) -> float:
        """When the peer last gave a sign of life, by the event loop's clock."""
        return self._connection.heard_at

    def allow_silence(self, seconds: float) -> None:
        """Let the peer be silent for so long, from now on, before the session ends for it."""
        self._connection.allow_silence(seconds)
        self._arm_timer()

    @property
    def greeted(self) -> bool:
        """Whether the handshake was done, that is, whether there is a ``peer``."""
        return self._opened.done() and not self._opened.cancelled() and not self._opened.exception()

    @property
    def reason(self) -> str:
        """Why the session ended, in words."""
        return self._reason.message.rstrip(".") if self._reason else "closed"

    def allow_payloads(self, limits: Mapping[int, int]) -> None:
        """Allow payloads of each kind up to so many bytes, from the next frame on.

        Never less than was allowed before: what a former plan sent is stale, and to be dropped
        rather than refused. Raises LocalProtocolError above ``MAX_PAYLOAD_BYTES``.
        """
        for kind, limit in limits.items():
            if limit > self._limits.get(kind, 0):
                self._connection.set_payload_limit(kind, limit)
                self._limits[kind] = limit

    def on_close(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(reason)`` when this session ends; at once if it has."""
        if self._ended:
            callback(self.reason)
        else:
            self._on_close.append(callback)

    @property
    def ended(self) -> bool:
        """Whether nothing will be sent or received any more."""
        # The connection may know of the end before us: the last events of a read are still under
        # way, and their handlers shall not fail for what comes after them.
        return self._ended or self._connection.state is State.CLOSED

    def send(self, message: Message) -> None:
        """Queue a message. After the end it goes nowhere: ``on_close`` tells why."""
        if not self.ended:
            self._write(self._connection.send(message))

    def send_raw(self, frame: Frame) -> None:
        """Queue a frame as it came in from elsewhere."""
        if not self.ended:
            self._write(self._connection.send_raw(frame))

    @property
    def congested(self) -> bool:
        """Whether the peer is behind: ``drain`` would wait."""
        return self._stream.congested

    async def drain(self) -> None:
        """Wait until the peer has taken enough. Raises PeerLostError when it is gone."""
        await self._stream.drain()

    async def close(self) -> None:
        """End the session on purpose; what was sent before still goes out."""
        self._finish()
        await self._stream.wait_closed()

    def end(self, reason: EdgeError) -> None:
        """End the session at once for this reason, and tell the peer; those who asked are told
        before this returns."""
        if self._connection.state is State.OPEN:
            self.send(ErrorReport(CONNECTION, NO_SEQUENCE, reason.to_dict()))
        self._end(reason)

    # --- driven by the event loop -----------------------------------------------------

    def _begin(self) -> None:
        self._arm_timer()
        self._stream.receive_with(self._on_data)

    def _on_data(self, data: bytes) -> None:
        if self._ended:
            return
        if not data and self._stream.error is not None:
            self._end(self._stream.error)
            return
        self.traffic.received_bytes += len(data)
        events = self._connection.receive(data, self._loop.time())
        self._write(self._connection.data_to_send())
        try:
            for event in events:
                self._on_event(event)
        except EdgeError as error:
            self.end(error)

    def _on_event(self, event: Event) -> None:
        if self._ended:
            return
        if isinstance(event, FrameReceived):
            self.traffic.received_messages += 1
            self._handler.on_frame(self, event.frame)
        elif isinstance(event, MessageReceived):
            self.traffic.received_messages += 1
            if isinstance(event.message, ErrorReport) and event.message.epoch == CONNECTION:
                self._end(error_from_dict(event.message.error))  # why the peer closes it
            else:
                self._handler.on_message(self, event.message, event.frame)
        elif isinstance(event, Opened):
            self._check_identity(event.peer)
            self._opened.set_result(event.peer)
            self._arm_timer()  # heartbeats are due sooner than the handshake was
            self._told_open(self)
        elif isinstance(event, Closed):
            self._end(event.reason)

    def _check_identity(self, peer: Hello | Welcome) -> None:
        """What a peer calls itself must be what its certificate proved it to be."""
        proven = self._stream.peer_id
        if proven is not None and proven != peer.device_id:
            raise RemoteProtocolError(
                f"{self.address} proved to be device {proven[:8]} and calls itself"
                f" {peer.device_id[:8]}."
            )

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._connection.next_timer()
        if due is not None:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        events = self._connection.handle_timer(self._loop.time())
        self._write(self._connection.data_to_send())
        for event in events:
            self._on_event(event)
        if not self._ended:
            self._arm_timer()

    def _write(self, buffers: Sequence[Buffer]) -> None:
        if not buffers:
            return
        try:
            self._stream.write(buffers)
        except PeerLostError as error:
            # The caller is in the middle of something; the end comes in a turn of its own.
            self._loop.call_soon(self._end, error)
            return
        self.traffic.sent_messages += 1
        self.traffic.sent_bytes += sum([len(buffer) for buffer in buffers])

    def _end(self, reason: EdgeError | None) -> None:
        self._reason = self._reason or reason
        self._finish()

    def _finish(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._connection.close()
        self._stream.close()
        if not self._opened.done():
            self._opened.set_exception(
                self._reason or PeerLostError(f"{self.address} closed the connection.")
            )
            self._opened.exception()  # an accepted stream has nobody who waits for it
        for callback in self._on_close:
            callback(self.reason)
        self._on_close.clear()
        self._handler.on_session_closed(self)


def _connection(role: Role, me: Introduction, timeouts: Timeouts | None) -> Connection:
    return Connection(
        role,
        asyncio.get_running_loop().time(),
        name=me.name,
        device_id=me.device_id,
        software=me.software,
        boot=me.boot,
        timeouts=timeouts,
        undecoded=ROUTED_KINDS,
    )
