"""TCP streams over asyncio, IPv4 and IPv6. Bytes only; frames and handshakes are above this.

An ``asyncio.Protocol`` rather than asyncio's streams: a read hands over the very object that
the loop received, without a second buffer between. Errors of the system become
``PeerLostError`` here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar, cast

from edgellm.errors import PeerLostError
from edgellm.transport.base import MAX_BUFFERED_BYTES, Buffer, Handlers, OnStream
from edgellm.transport.buffers import Gate, Inbox

_READ_HIGH = 4 * 1024 * 1024
"""Unread bytes at which the socket is no longer read: the peer's sending then stalls."""
_READ_LOW = _READ_HIGH // 2
_WRITE_HIGH = 4 * 1024 * 1024
"""Unsent bytes at which ``drain`` waits: several chunks of hidden rows, so stages overlap."""
_JOIN_BELOW = 64 * 1024
"""Buffers smaller than this together leave in one system call, for the price of a copy."""
_LINGER_S = 5.0
"""How long ``close`` goes on sending what is queued."""
_FAMILY_DELAY_S = 0.25
"""Head start of an address over the next one (RFC 8305), where a name has several."""
_PORTS = 1 << 16
_Made = TypeVar("_Made", bound=asyncio.Protocol)
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
_USER_TIMEOUT_MS = 6000
"""Unacknowledged data for this long breaks the connection: the only way to see a black hole."""


class TcpStream(asyncio.Protocol):
    """A ``Stream`` over one TCP connection. Made by ``TcpTransport``."""

    def __init__(self, handlers: Handlers | None = None) -> None:
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._inbox = Inbox()
        self._gate = Gate()
        self._reading_paused = False
        self._closed = self._loop.create_future()
        self._peername = "?"
        self._local = False

    # --- Stream -----------------------------------------------------------------------

    @property
    def peername(self) -> str:
        return self._peername

    @property
    def local(self) -> bool:
        return self._local

    @property
    def peer_id(self) -> str | None:
        return None

    async def read(self, max_bytes: int) -> bytes:
        chunk = await self._inbox.read(max_bytes)
        if self._reading_paused and self._inbox.held <= _READ_LOW:
            self._reading_paused = False
            if self._transport is not None:
                self._transport.resume_reading()
        return chunk

    def receive_with(self, callback: Callable[[bytes], None]) -> None:
        self._inbox.hand_to(callback)
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()

    @property
    def error(self) -> PeerLostError | None:
        return self._inbox.error

    def write(self, buffers: Sequence[Buffer]) -> None:
        transport = self._usable()
        size = sum([len(each) for each in buffers])
        if transport.get_write_buffer_size() + size > MAX_BUFFERED_BYTES:
            error = PeerLostError(f"{self._peername} does not read; too much waits for it.")
            self._inbox.fail(error)
            transport.abort()
            raise error
        if size < _JOIN_BELOW and len(buffers) > 1:
            buffers = (b"".join(buffers),)
        self._send(transport, buffers)

    @property
    def congested(self) -> bool:
        return self._gate.shut_now

    async def drain(self) -> None:
        self._usable()
        await self._gate.passed()
        self._usable()

    def close(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._say_goodbye(transport)
        transport.close()
        if transport.get_write_buffer_size():
            self._loop.call_later(_LINGER_S, transport.abort)
        self._inbox.end()
        self._gate.open()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    # --- asyncio.Protocol -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        peer = transport.get_extra_info("peername")
        self._peername = shown(peer)
        self._local = _is_loopback(peer)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            _tune(sock)
        self._connected(self._transport)

    def data_received(self, data: bytes) -> None:
        self._inbox.put(data)
        if self._inbox.held >= _READ_HIGH and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._inbox.end()
        return False  # the transport sends what is queued and closes: there is no half-open state

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            reason = f"the connection to {self._peername} broke: {_reason(exc)}."
            self._inbox.fail(PeerLostError(reason))
        self._inbox.end()
        self._gate.open()
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._gate.shut()

    def resume_writing(self) -> None:
        self._gate.open()

    # --- what an encrypted stream does otherwise ----------------------------------------

    def _connected(self, transport: asyncio.Transport) -> None:
        del transport
        self._serve()

    def _send(self, transport: asyncio.Transport, buffers: Sequence[Buffer]) -> None:
        for each in buffers:
            transport.write(each)

    def _say_goodbye(self, transport: asyncio.Transport) -> None:
        """The last that is sent; the end of a TCP stream says enough by itself."""

    # --- glue -------------------------------------------------------------------------

    def _serve(self) -> None:
        if self._handlers is not None:
            self._handlers.start(self)

    def _usable(self) -> asyncio.Transport:
        if self._inbox.error is not None:
            raise self._inbox.error
        if self._transport is None or self._transport.is_closing():
            raise PeerLostError(f"the connection to {self._peername} is closed.")
        return self._transport


class TcpListener:
    """A listening socket and the handlers of what it accepted."""

    def __init__(self, server: asyncio.Server, handlers: Handlers) -> None:
        self._server = server
        self._handlers = handlers
        host, port, *_ = server.sockets[0].getsockname()
        self._address = (str(host), int(port))

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    async def close(self) -> None:
        self._server.close()
        # Not wait_closed: from Python 3.12 on it waits for the streams too, and those close here.
        await self._handlers.cancel()


class TcpTransport:
    """Dials and listens with TCP."""

    async def dial(self, host: str, port: int, timeout: float) -> TcpStream:  # noqa: ASYNC109
        async with within(timeout, host, port):
            return await connect(TcpStream, host, port)

    async def listen(self, host: str, port: int, on_stream: OnStream) -> TcpListener:
        handlers = Handlers(on_stream)
        return TcpListener(await serve(lambda: TcpStream(handlers), host, port), handlers)


@contextlib.asynccontextmanager
async def within(seconds: float, host: str, port: int) -> AsyncIterator[None]:
    """Raises PeerLostError when the body takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        where = shown((host, port))
        raise PeerLostError(f"{where} did not answer within {seconds:g} s.") from error


async def connect(make: Callable[[], _Made], host: str, port: int) -> _Made:
    """A TCP connection for the protocol that ``make`` makes. Raises PeerLostError."""
    loop = asyncio.get_running_loop()
    where = shown((host, port))
    if not 0 < port < _PORTS:
        raise PeerLostError(f"cannot connect to {where}: no such port.")
    # Another loop than asyncio's own (uvloop) tries one address after the other. A single address
    # has nothing to race for, and a race that is cancelled as it is won leaves a socket open.
    races = isinstance(loop, asyncio.BaseEventLoop) and _ip(host) is None
    more: dict[str, Any] = {"happy_eyeballs_delay": _FAMILY_DELAY_S} if races else {}
    try:
        _, made = await loop.create_connection(make, host, port, **more)
    except TimeoutError:
        raise  # ours, or the system's own: nobody answered
    except (OSError, UnicodeError) as error:
        raise PeerLostError(f"cannot connect to {where}: {_reason(error)}.") from error
    return made


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, without its scope; None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


async def serve(make: Callable[[], asyncio.Protocol], host: str, port: int) -> asyncio.Server:
    """A listening socket that gives each connection what ``make`` makes. Raises PeerLostError."""
    try:
        return await asyncio.get_running_loop().create_server(make, host, port)
    except (OSError, UnicodeError, OverflowError) as error:
        where = shown((host, port))
        raise PeerLostError(
            f"cannot listen on {where}: {_reason(error)}.", hint="Choose another port."
        ) from error


def _tune(sock: socket.socket) -> None:
    """Small frames leave at once, and a peer that vanished is noticed. Best effort by system."""
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    for name, value in (*_KEEPALIVE, ("TCP_USER_TIMEOUT", _USER_TIMEOUT_MS)):
        option = getattr(socket, name, None)
        if option is not None:
            options.append((socket.IPPROTO_TCP, option, value))
    for level, option, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def shown(address: object) -> str:
    """A socket's address for people: ``host:port``."""
    if not isinstance(address, tuple) or len(address) < 2:
        return "?"
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(address: object) -> bool:
    if not isinstance(address, tuple) or not address:
        return False
    ip = _ip(str(address[0]))
    return ip is not None and ip.is_loopback


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()  # asyncio's own texts repeat the address
    return str(error) or type(error).__name__
