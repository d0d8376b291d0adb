"""Streams without sockets, with faults on demand: for tests, and for stages in one process.

A ``MemoryNetwork`` joins any number of named transports. Each direction between two names is
a route, with a ``Link`` (delay, jitter, bandwidth, corruption) and faults that the caller
injects: cut, cut after so many bytes, stall, corrupt a byte, refuse dials. Randomness comes
from a seed and the route's names alone, so the same writes meet the same faults. Time is the
event loop's. Limits and errors are those of ``tcp``.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgellm.errors import PeerLostError
from edgellm.transport.base import MAX_BUFFERED_BYTES, Buffer, Handlers, OnStream
from edgellm.transport.buffers import Gate, Inbox

_FIRST_PORT = 49152


@dataclass(frozen=True, slots=True)
class Link:
    """How one direction between two transports behaves."""

    delay_s: float = 0.0
    """One way."""
    jitter_s: float = 0.0
    """Up to this much more, by chance; order is kept."""
    bytes_per_s: float | None = None
    corruption: float = 0.0
    """Chance that one byte of a write arrives changed."""
    window: int = 4 * 1024 * 1024
    """Bytes under way or unread at which ``drain`` waits."""


class MemoryNetwork:
    """The wires between transports, and the hand that cuts them."""

    def __init__(self, seed: int = 0, link: Link | None = None) -> None:
        self._seed = seed
        self._link = link or Link()
        self._routes: dict[tuple[str, str], _Route] = {}
        self._listeners: dict[tuple[str, int], MemoryListener] = {}
        self._refusing: set[str] = set()
        self._ports = itertools.count(_FIRST_PORT)

    def transport(self, name: str) -> MemoryTransport:
        """A transport whose streams are known to the faults below by ``name``."""
        return MemoryTransport(self, name)

    def set_link(self, source: str, target: str, link: Link) -> None:
        """Change one direction, for open streams too, from the next write on."""
        self._route(source, target).link = link

    def cut(self, one: str, other: str | None = None) -> None:
        """Break all streams between two transports, or all of one; what is under way is lost."""
        for (source, target), route in self._routes.items():
            if one in (source, target) and other in (None, source, target):
                route.cut(f"the connection between {source} and {target} was cut.")

    def cut_after(self, source: str, target: str, count: int) -> None:
        """Break the stream that carries byte ``count`` (from 0, from now), just before it."""
        route = self._route(source, target)
        route.cut_at = route.sent + count

    def corrupt_at(self, source: str, target: str, count: int) -> None:
        """Change the byte ``count`` (from 0, from now) of the route."""
        route = self._route(source, target)
        route.corrupt_at.add(route.sent + count)

    def stall(self, source: str, target: str) -> None:
        """Deliver nothing more in this direction, and say nothing: a black hole."""
        self._route(source, target).stall()

    def resume(self, source: str, target: str) -> None:
        """End a stall: all that was held back arrives."""
        self._route(source, target).resume()

    def refuse(self, name: str, refused: bool = True) -> None:
        """Refuse all dials to a transport, or no longer."""
        (self._refusing.add if refused else self._refusing.discard)(name)

    def _route(self, source: str, target: str) -> _Route:
        route = self._routes.get((source, target))
        if route is None:
            chance = random.Random(f"{self._seed} {source} {target}")
            route = self._routes[source, target] = _Route(self._link, chance)
        return route

    async def _connect(self, source: str, host: str, port: int) -> MemoryStream:
        listener = self._listeners.get((host, port))
        if listener is None:
            raise PeerLostError(f"cannot connect to {host}:{port}: connection refused.")
        there = self._route(source, listener.name)
        back = self._route(listener.name, source)
        for route in (there, back):
            await route.flowing.wait()
        await asyncio.sleep(there.link.delay_s + back.link.delay_s)
        if listener.name in self._refusing or self._listeners.get((host, port)) is not listener:
            raise PeerLostError(f"cannot connect to {host}:{port}: connection refused.")
        near = MemoryStream(f"{host}:{port}", there)
        far = MemoryStream(f"{source}:{next(self._ports)}", back)
        near.join(far)
        far.join(near)
        listener.handlers.start(far)
        return near

    def _listen(self, name: str, host: str, port: int, handlers: Handlers) -> MemoryListener:
        port = port or next(self._ports)
        if (host, port) in self._listeners:
            raise PeerLostError(
                f"cannot listen on {host}:{port}: address already in use.",
                hint="Choose another port.",
            )
        listener = MemoryListener(self, name, (host, port), handlers)
        self._listeners[host, port] = listener
        return listener

    def _forget(self, listener: MemoryListener) -> None:
        self._listeners.pop(listener.address, None)


class MemoryTransport:
    """Dials and listens within one ``MemoryNetwork``. Made by ``MemoryNetwork.transport``."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self._network = network
        self._name = name

    async def dial(self, host: str, port: int, timeout: float) -> MemoryStream:  # noqa: ASYNC109
        try:
            async with asyncio.timeout(timeout):
                return await self._network._connect(self._name, host, port)
        except TimeoutError as error:
            raise PeerLostError(f"{host}:{port} did not answer within {timeout:g} s.") from error

    async def listen(self, host: str, port: int, on_stream: OnStream) -> MemoryListener:
        return self._network._listen(self._name, host, port, Handlers(on_stream))


class MemoryListener:
    """A registered address and the handlers of what it accepted."""

    def __init__(
        self, network: MemoryNetwork, name: str, address: tuple[str, int], handlers: Handlers
    ) -> None:
        self.name = name
        self.handlers = handlers
        self._network = network
        self._address = address

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    async def close(self) -> None:
        self._network._forget(self)
        await self.handlers.cancel()


class MemoryStream:
    """One end of a connection: writes into its route, reads what the other end's route brings."""

    def __init__(self, peername: str, route: _Route) -> None:
        self.inbox = Inbox()
        self._peername = peername
        self._route = route
        self._pipe: _Pipe | None = None
        self._source: _Pipe | None = None
        self._closed = asyncio.get_running_loop().create_future()

    @property
    def peername(self) -> str:
        return self._peername

    def join(self, far: MemoryStream) -> None:
        """Lay the pipe to the other end."""
        self._pipe = far._source = _Pipe(self._route, self, far)

    @property
    def peer_id(self) -> str | None:
        return None

    @property
    def local(self) -> bool:
        return True

    async def read(self, max_bytes: int) -> bytes:
        chunk = await self.inbox.read(max_bytes)
        if self._source is not None:
            self._source.taken(len(chunk))
        return chunk

    def receive_with(self, callback: Callable[[bytes], None]) -> None:
        def take(chunk: bytes) -> None:
            if self._source is not None:
                self._source.taken(len(chunk))
            callback(chunk)

        self.inbox.hand_to(take)

    @property
    def error(self) -> PeerLostError | None:
        return self.inbox.error

    def write(self, buffers: Sequence[Buffer]) -> None:
        pipe = self._usable()
        data = b"".join(buffers)
        if pipe.pending + len(data) > MAX_BUFFERED_BYTES:
            error = PeerLostError(f"{self._peername} does not read; too much waits for it.")
            pipe.snap(error)
            raise error
        if data:
            pipe.send(data)

    @property
    def congested(self) -> bool:
        return self._pipe is not None and self._pipe.gate.shut_now

    async def drain(self) -> None:
        await self._usable().gate.passed()
        self._usable()

    def close(self) -> None:
        if self._closed.done():
            return
        if self._pipe is not None:
            self._pipe.end()
        self.finish()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    def finish(self, error: PeerLostError | None = None) -> None:
        """This end is over: by its own close, at the other's end, or broken by ``error``."""
        if error is not None:
            self.inbox.fail(error)
        self.inbox.end()
        if self._pipe is not None:
            self._pipe.gate.open()
        if not self._closed.done():
            self._closed.set_result(None)

    def drop(self) -> None:
        """Nothing that this end wrote arrives any more."""
        if self._pipe is not None:
            self._pipe.drop()

    def _usable(self) -> _Pipe:
        if self.inbox.error is not None:
            raise self.inbox.error
        if self._pipe is None or self._closed.done():
            raise PeerLostError(f"the connection to {self._peername} is closed.")
        return self._pipe


class _Route:
    """One direction between two names: its link, its faults, and the pipes that use it."""

    def __init__(self, link: Link, chance: random.Random) -> None:
        self.link = link
        self.chance = chance
        self.sent = 0
        """Bytes that were ever written into the route."""
        self.cut_at: int | None = None
        self.corrupt_at: set[int] = set()
        self.pipes: set[_Pipe] = set()
        self.flowing = asyncio.Event()
        self.flowing.set()

    def stall(self) -> None:
        self.flowing.clear()

    def resume(self) -> None:
        self.flowing.set()
        for pipe in list(self.pipes):
            pipe.deliver()

    def cut(self, why: str) -> None:
        for pipe in list(self.pipes):
            pipe.snap(PeerLostError(why))

    def admit(self, data: bytes) -> tuple[bytes, bool]:
        """What becomes of a write: the bytes that will arrive, and whether the stream breaks."""
        begin, broken = self.sent, False
        if self.cut_at is not None and begin + len(data) > self.cut_at:
            data, broken = data[: self.cut_at - begin], True
            self.cut_at = None
        self.sent += len(data)
        hits = {at - begin for at in self.corrupt_at if begin <= at < self.sent}
        self.corrupt_at -= {at + begin for at in hits}
        if data and self.link.corruption and self.chance.random() < self.link.corruption:
            hits.add(self.chance.randrange(len(data)))
        if hits:
            changed = bytearray(data)
            for at in sorted(hits):
                changed[at] ^= self.chance.randrange(1, 256)
            data = bytes(changed)
        return data, broken


class _Pipe:
    """The bytes of one stream in one direction, on their way. ``b""`` in it is the end."""

    def __init__(self, route: _Route, writer: MemoryStream, reader: MemoryStream) -> None:
        self.gate = Gate()
        self.pending = 0
        """Bytes written and not yet read."""
        self._route = route
        self._writer = writer
        self._reader = reader
        self._queue: deque[bytes | None] = deque()
        self._due = 0
        """How many of the queue have reached their time; more than 0 only in a stall."""
        self._line_free_at = 0.0
        self._last_arrival = 0.0
        self._over = False
        route.pipes.add(self)

    def send(self, data: bytes) -> None:
        """Put data (not empty) on its way."""
        if self._over:
            return
        arriving, broken = self._route.admit(data)
        if arriving:
            self.pending += len(arriving)
            if self.pending > self._route.link.window:
                self.gate.shut()
            self._put(arriving)
        if broken:
            self._put(None)
            self._over = True

    def end(self) -> None:
        """Close the stream when all that was sent before has arrived."""
        if not self._over:
            self._put(b"")

    def taken(self, count: int) -> None:
        """The reader has read so many bytes."""
        self.pending -= count
        if self.pending <= self._route.link.window // 2:
            self.gate.open()

    def deliver(self) -> None:
        """Hand over what is due, unless the route is stalled."""
        while self._due and self._queue and self._route.flowing.is_set():
            self._due -= 1
            data = self._queue.popleft()
            if data is None:
                self.snap(PeerLostError("the connection was cut."))
            elif data:
                self._reader.inbox.put(data)
            else:
                self.drop()
                self._reader.drop()
                self._reader.finish()

    def snap(self, error: PeerLostError) -> None:
        """Break the stream for both ends; what is under way, either way, is lost."""
        self.drop()
        self._reader.drop()
        self._writer.finish(error)
        self._reader.finish(error)

    def drop(self) -> None:
        """Carry nothing more."""
        self._over = True
        self._queue.clear()
        self._due = 0
        self._route.pipes.discard(self)

    def _put(self, data: bytes | None) -> None:
        loop = asyncio.get_running_loop()
        link = self._route.link
        now = loop.time()
        self._line_free_at = max(now, self._line_free_at)
        if link.bytes_per_s and data:
            self._line_free_at += len(data) / link.bytes_per_s
        jitter = self._route.chance.uniform(0.0, link.jitter_s) if link.jitter_s else 0.0
        arrival = max(self._last_arrival, self._line_free_at + link.delay_s + jitter)
        self._last_arrival = arrival
        self._queue.append(data)
        if arrival > now:
            loop.call_at(arrival, self._arrive)
        else:
            loop.call_soon(self._arrive)

    def _arrive(self) -> None:
        """One more of the queue is due: timers of equal time fire in any order, bytes may not."""
        if self._queue:
            self._due += 1
            self.deliver()
