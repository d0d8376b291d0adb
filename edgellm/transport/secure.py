"""Streams that only paired devices get: mutual TLS 1.3 over TCP, both ends' certificates pinned.

Nothing that a peer sends reaches a handler before its certificate has been checked. The one
exception is pairing, which goes over the same port: a connection that begins with ``EGP1`` instead
of a TLS handshake is handed to ``on_pairing`` as it is. Whatever begins otherwise is closed. The
back-pressure, limits and errors are those of ``tcp``; encryption is in ``channel``.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

from edgellm.errors import NotPairedError, PeerLostError
from edgellm.identity.tls import Credentials
from edgellm.transport.base import Buffer, Handlers, OnStream
from edgellm.transport.channel import Channel
from edgellm.transport.tcp import TcpListener, TcpStream, connect, serve, within

PAIRING_MAGIC = b"EGP1"
"""The first bytes of a connection on which two devices are to be paired."""
HANDSHAKE_S = 5.0
"""From accepting a connection to the end of its handshake, or to the first bytes of a pairing."""
MAX_UNSETTLED = 64
"""Connections that have not proven anything yet; one more, and an old one is dropped."""
MAX_PAIRINGS = 8
"""Pairings at once. A person types their codes: more are no pairings."""
REFUSED_EVERY_S = 60.0
"""The same address is reported at most so often."""

_TLS_HANDSHAKE = 0x16
_REFUSAL_LINGER_S = 0.5
"""How long a refused peer has to take the alert: closing at once may destroy it on its way."""
_MAX_REMEMBERED = 1024
"""Addresses that were reported lately."""
_PAIR_HINT = (
    "Run `edgellm invite` on a device of the cluster, then `edgellm join --code CODE` on the other."
)

OnRefused: TypeAlias = Callable[[str], None]
"""Takes a line for people about somebody who was turned away."""
_Settled: TypeAlias = Callable[[PeerLostError | None], None]


class SecureStream(TcpStream):
    """A ``Stream`` whose peer is known. Made by ``SecureTransport``.

    ``settled`` is called once: with None when the peer has proven who it is, or, after the
    connection has closed, with what came between.
    """

    def __init__(
        self,
        credentials: Credentials,
        settled: _Settled,
        handlers: Handlers | None = None,
        *,
        server_side: bool = False,
    ) -> None:
        super().__init__(handlers)
        self._credentials = credentials
        made = credentials.server_context if server_side else credentials.client_context
        self._channel = Channel(made(), server_side=server_side)
        self._server_side = server_side
        self._settled: _Settled | None = settled
        self._peer_id: str | None = None
        self._heard = False
        self._refused = False

    @property
    def peer_id(self) -> str | None:
        return self._peer_id

    def abort(self) -> None:
        """Close at once, whatever is queued."""
        self._inbox.end()
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol -------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or self._refused or transport.is_closing():
            return
        try:
            plain = self._channel.receive(data)
            if self._channel.shaken and self._peer_id is None:
                self._peer_id = self._proven_id()
        except ssl.SSLError as error:
            self._break(transport, self._error_for(error))
            return
        except NotPairedError as error:
            self._break(transport, error)
            return
        self._flush(transport)
        if self._peer_id is not None:
            self._tell(None)
        if plain:
            self._heard = True
            super().data_received(plain)
        if self._channel.ended:
            self.close()

    def eof_received(self) -> bool:
        if not self._channel.ended:
            reason = "it ended without a farewell" if self._peer_id else "it ended in the handshake"
            self._inbox.fail(PeerLostError(f"the connection to {self._peername} broke: {reason}."))
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        lost = PeerLostError(f"{self._peername} closed the connection during the handshake.")
        self._tell(self._inbox.error or lost)

    # --- TcpStream --------------------------------------------------------------------

    def _connected(self, transport: asyncio.Transport) -> None:
        if not self._server_side:
            self._channel.receive(b"")
            self._flush(transport)

    def _send(self, transport: asyncio.Transport, buffers: Sequence[Buffer]) -> None:
        self._channel.send(buffers)
        self._flush(transport)

    def _say_goodbye(self, transport: asyncio.Transport) -> None:
        if self._peer_id is not None and not self._refused and not self._channel.ended:
            self._channel.end()
            self._flush(transport)

    # --- glue -------------------------------------------------------------------------

    def _flush(self, transport: asyncio.Transport) -> None:
        if encrypted := self._channel.outgoing():
            transport.write(encrypted)

    def _tell(self, error: PeerLostError | None) -> None:
        settled, self._settled = self._settled, None
        if settled is not None:
            settled(error)
            if error is None:
                self._serve()

    def _break(self, transport: asyncio.Transport, error: PeerLostError) -> None:
        """End for a reason of TLS."""
        self._refused = True
        self._inbox.fail(error)
        self._gate.open()
        if isinstance(error, NotPairedError):
            self._flush(transport)
            transport.write_eof()
            self._loop.call_later(_REFUSAL_LINGER_S, transport.abort)
        else:
            transport.abort()

    def _proven_id(self) -> str:
        try:
            return self._credentials.peer_of(self._channel.connection)
        except NotPairedError as error:
            raise self._not_paired(f"{self._peername} is not paired: {error.message}") from error

    def _error_for(self, error: ssl.SSLError) -> PeerLostError:
        reason = error.reason or ""
        if not self._heard:
            if isinstance(error, ssl.SSLCertVerificationError):
                return self._not_paired(f"{self._peername} is not a device of this cluster.")
            if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
                return self._not_paired(
                    f"{self._peername} does not take this device for one of its cluster."
                )
        if self._peer_id is None:
            return PeerLostError(f"{self._peername} does not speak TLS 1.3 as edgellm does.")
        return PeerLostError(
            f"the connection to {self._peername} broke: what arrived was not what was sent."
        )

    def _not_paired(self, message: str) -> NotPairedError:
        return NotPairedError(message, hint=_PAIR_HINT)


class Reception:
    """Where accepted connections wait until they have proven something, or their time is up."""

    def __init__(
        self,
        credentials: Credentials,
        streams: Handlers,
        pairings: Handlers | None,
        on_refused: OnRefused,
    ) -> None:
        self._credentials = credentials
        self._streams = streams
        self._pairings = pairings
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._unsettled: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._reported: dict[str, float] = {}
        self._closed = False

    async def close(self) -> None:
        """Send all away, also those that are being served."""
        self._closed = True
        for transport in list(self._unsettled):
            self._expire(transport)
        await self._streams.cancel()
        if self._pairings is not None:
            await self._pairings.cancel()

    def arrival(self) -> asyncio.Protocol:
        """For a connection that was just accepted."""
        return _Arrival(self)

    def admit(self, transport: asyncio.Transport) -> None:
        """Give a new connection its time, at the cost of the oldest of who has the most."""
        if self._closed:
            transport.abort()
            return
        if len(self._unsettled) >= MAX_UNSETTLED:
            crowd, _ = Counter(map(_host_of, self._unsettled)).most_common(1)[0]
            oldest = next(each for each in self._unsettled if _host_of(each) == crowd)
            self._expire(oldest)
        self._unsettled[transport] = self._loop.call_later(HANDSHAKE_S, self._expire, transport)

    def settle(self, transport: asyncio.Transport) -> None:
        """It is through, or gone."""
        if (timer := self._unsettled.pop(transport, None)) is not None:
            timer.cancel()

    def secure(self, transport: asyncio.Transport, first: bytes) -> None:
        """The peer begins a TLS handshake, with ``first``."""

        def settled(error: PeerLostError | None) -> None:
            self.settle(transport)
            if isinstance(error, NotPairedError):
                self._report(_host_of(transport))

        stream = SecureStream(self._credentials, settled, self._streams, server_side=True)
        _hand_over(transport, stream, first)

    def pair(self, transport: asyncio.Transport, first: bytes) -> None:
        """The peer wants to be paired; ``first`` is what it has sent."""
        self.settle(transport)
        if self._pairings is None or len(self._pairings) >= MAX_PAIRINGS:
            transport.abort()
            return
        _hand_over(transport, TcpStream(self._pairings), first)

    def _expire(self, transport: asyncio.Transport) -> None:
        self.settle(transport)
        transport.abort()

    def _report(self, host: str) -> None:
        now = self._loop.time()
        if now - self._reported.get(host, -REFUSED_EVERY_S) < REFUSED_EVERY_S:
            return
        self._reported.pop(host, None)
        if len(self._reported) >= _MAX_REMEMBERED:
            del self._reported[next(iter(self._reported))]
        self._reported[host] = now
        self._on_refused(f"a device at {host} that is not paired tried to connect")


class SecureListener(TcpListener):
    """A listening socket, and all that came in by it."""

    def __init__(self, server: asyncio.Server, streams: Handlers, reception: Reception) -> None:
        super().__init__(server, streams)
        self._reception = reception

    async def close(self) -> None:
        await super().close()
        await self._reception.close()


class _Arrival(asyncio.Protocol):
    """Sees the first bytes of an accepted connection, and hands it to whom they are for."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception
        self._transport: asyncio.Transport | None = None
        self._first = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reception.admit(self._transport)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._first += data
        if self._first[0] == _TLS_HANDSHAKE:
            self._reception.secure(transport, self._first)
        elif self._first.startswith(PAIRING_MAGIC):
            self._reception.pair(transport, self._first)
        elif not PAIRING_MAGIC.startswith(self._first):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._reception.settle(self._transport)


class SecureTransport:
    """Dials and listens with TLS, for the devices that ``credentials`` trusts."""

    def __init__(
        self,
        credentials: Credentials,
        on_pairing: OnStream | None = None,
        on_refused: OnRefused = lambda line: None,
    ) -> None:
        self._credentials = credentials
        self._on_pairing = on_pairing
        self._on_refused = on_refused

    async def dial(self, host: str, port: int, timeout: float) -> SecureStream:  # noqa: ASYNC109
        greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settled(error: PeerLostError | None) -> None:
            if greeted.done():
                return
            if error is None:
                greeted.set_result(None)
            else:
                greeted.set_exception(error)

        stream: SecureStream | None = None
        try:
            async with within(timeout, host, port):
                stream = await connect(lambda: SecureStream(self._credentials, settled), host, port)
                await greeted
        except BaseException:
            if greeted.done() and not greeted.cancelled():
                greeted.exception()
            if stream is not None:
                stream.abort()
            raise
        return stream

    async def listen(self, host: str, port: int, on_stream: OnStream) -> SecureListener:
        pairings = Handlers(self._on_pairing) if self._on_pairing is not None else None
        streams = Handlers(on_stream)
        reception = Reception(self._credentials, streams, pairings, self._on_refused)
        return SecureListener(await serve(reception.arrival, host, port), streams, reception)


def _hand_over(transport: asyncio.Transport, protocol: TcpStream, first: bytes) -> None:
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    protocol.data_received(first)


def _host_of(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else "?"
