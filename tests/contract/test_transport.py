"""One contract for every transport, run over TCP, TLS and memory, on asyncio's event loop and on
uvloop's; then what is special to each.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from edgellm.errors import PeerLostError, RemoteProtocolError
from edgellm.transport.base import MAX_BUFFERED_BYTES, Listener, OnStream, Stream, Transport
from edgellm.transport.buffers import Inbox
from edgellm.transport.memory import Link, MemoryNetwork
from edgellm.transport.secure import SecureTransport
from edgellm.transport.tcp import TcpTransport
from edgellm.wire import messages as m
from edgellm.wire.connection import Closed, Connection, MessageReceived, Opened, Role
from edgellm.wire.frames import FrameDecoder
from tests.circles import Circle, device

HOST = "127.0.0.1"
PATIENCE_S = 5.0


@dataclass
class Pair:
    """A dialing and a listening transport, and what the tests opened with them."""

    dialer: Transport
    server: Transport
    listeners: list[Listener] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    async def listen(self, on_stream: OnStream, host: str = HOST) -> tuple[str, int]:
        listener = await self.server.listen(host, 0, on_stream)
        self.listeners.append(listener)
        return listener.address

    async def connect(self, host: str = HOST) -> tuple[Stream, Stream]:
        """(the dialing end, the accepting end), both left open until the test ends."""
        accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

        async def keep(stream: Stream) -> None:
            accepted.set_result(stream)
            await stream.wait_closed()

        near = await self.dialer.dial(*await self.listen(keep, host), PATIENCE_S)
        far = await asyncio.wait_for(accepted, PATIENCE_S)
        self.streams += [near, far]
        return near, far

    async def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for listener in self.listeners:
            await listener.close()


def secure_pair() -> Pair:
    near, far = device("near"), device("far")
    return Pair(
        SecureTransport(Circle(near, far).credentials),
        SecureTransport(Circle(far, near).credentials),
    )


@pytest.fixture(params=["tcp", "secure", "memory", "memory with delay"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param == "tcp":
        made = Pair(TcpTransport(), TcpTransport())
    elif request.param == "secure":
        made = secure_pair()
    else:
        delayed = Link(delay_s=0.002, jitter_s=0.002, bytes_per_s=1e9)
        network = MemoryNetwork(link=Link() if request.param == "memory" else delayed)
        made = Pair(network.transport("a"), network.transport("b"))
    async with asyncio.timeout(60):
        yield made
        await made.close()


async def read_exactly(stream: Stream, count: int, at_most: int = 1 << 20) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = await asyncio.wait_for(stream.read(min(at_most, count - len(data))), PATIENCE_S)
        if not piece:
            break
        data += piece
    return bytes(data)


async def read_to_end(stream: Stream) -> bytes:
    return await read_exactly(stream, 1 << 40)


# --- the contract ---------------------------------------------------------------------


async def test_bytes_arrive_in_order_both_ways(pair: Pair) -> None:
    near, far = await pair.connect()
    near.write([b"one ", bytearray(b"two "), memoryview(b"three")])
    far.write([b"back"])
    assert await read_exactly(far, 13) == b"one two three"
    assert await read_exactly(near, 4) == b"back"


async def test_a_read_gives_at_most_what_was_asked_for(pair: Pair) -> None:
    near, far = await pair.connect()
    near.write([b"abcdef"])
    assert await read_exactly(far, 6, at_most=1) == b"abcdef"


async def test_writing_nothing_is_harmless_and_is_not_the_end(pair: Pair) -> None:
    near, far = await pair.connect()
    near.write([])
    near.write([b""])
    near.write([b"x"])
    assert await read_exactly(far, 1) == b"x"


async def test_large_payloads_arrive_whole(pair: Pair) -> None:
    near, far = await pair.connect()
    data = bytes(range(256)) * 40_000  # 10 MB: more than any buffer between

    async def send() -> None:
        for at in range(0, len(data), 500_000):
            near.write([data[at : at + 500_000]])
            await near.drain()

    sending = asyncio.create_task(send())
    assert await read_exactly(far, len(data)) == data
    await sending


async def test_drain_waits_for_a_peer_that_does_not_read(pair: Pair) -> None:
    near, far = await pair.connect()
    written = 0

    async def flood() -> None:
        nonlocal written
        while written < 60_000_000:
            near.write([bytes(1_000_000)])
            written += 1_000_000
            await near.drain()

    flooding = asyncio.create_task(flood())
    stopped_at = -1
    while written != stopped_at:  # until nothing moves any more
        stopped_at = written
        await asyncio.sleep(0.2)
    assert not flooding.done()
    assert written < 30_000_000
    assert len(await read_exactly(far, 60_000_000)) == 60_000_000
    await asyncio.wait_for(flooding, PATIENCE_S)


async def test_a_writer_that_never_drains_is_stopped(pair: Pair) -> None:
    near, far = await pair.connect()
    block = bytes(8 << 20)
    with pytest.raises(PeerLostError, match="does not read"):
        for _ in range(2 * MAX_BUFFERED_BYTES // len(block)):
            near.write([block])
    with pytest.raises(PeerLostError):
        near.write([b"more"])
    await asyncio.wait_for(near.wait_closed(), PATIENCE_S)
    with contextlib.suppress(PeerLostError):
        await read_to_end(far)


async def test_close_sends_what_is_queued_and_then_the_end(pair: Pair) -> None:
    near, far = await pair.connect()
    near.write([bytes(3_000_000)])
    near.close()
    near.close()
    assert len(await read_to_end(far)) == 3_000_000
    assert await far.read(10) == b""
    await asyncio.wait_for(near.wait_closed(), PATIENCE_S)
    await asyncio.wait_for(far.wait_closed(), PATIENCE_S)


@pytest.mark.parametrize("by_peer", [False, True])
async def test_a_closed_stream_cannot_be_written(pair: Pair, by_peer: bool) -> None:
    near, far = await pair.connect()
    near.close()
    closed = near
    if by_peer:
        assert await read_to_end(far) == b""
        closed = far
        await asyncio.wait_for(far.wait_closed(), PATIENCE_S)
    with pytest.raises(PeerLostError):
        closed.write([b"x"])
    with pytest.raises(PeerLostError):
        await closed.drain()


async def test_close_ends_a_read_that_waits(pair: Pair) -> None:
    near, _ = await pair.connect()
    reading = asyncio.create_task(near.read(10))
    await asyncio.sleep(0.01)
    near.close()
    assert await asyncio.wait_for(reading, PATIENCE_S) == b""


async def test_a_cancelled_read_loses_nothing(pair: Pair) -> None:
    near, far = await pair.connect()
    reading = asyncio.create_task(far.read(10))
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    near.write([b"still here"])
    assert await read_exactly(far, 10) == b"still here"


async def test_two_readers_are_a_bug(pair: Pair) -> None:
    near, _ = await pair.connect()
    reading = asyncio.create_task(near.read(10))
    await asyncio.sleep(0.01)
    with pytest.raises(RuntimeError):
        await near.read(10)
    near.close()
    await reading


async def test_nobody_listens(pair: Pair) -> None:
    async def ignore(stream: Stream) -> None:
        del stream

    address = await pair.listen(ignore)
    await pair.listeners.pop().close()
    with pytest.raises(PeerLostError, match="refused"):
        await pair.dialer.dial(*address, PATIENCE_S)


async def test_an_address_in_use(pair: Pair) -> None:
    async def ignore(stream: Stream) -> None:
        del stream

    host, port = await pair.listen(ignore)
    with pytest.raises(PeerLostError, match="in use"):
        await pair.server.listen(host, port, ignore)


async def test_closing_a_listener_ends_its_streams(pair: Pair) -> None:
    near, far = await pair.connect()
    await pair.listeners.pop().close()
    assert await read_to_end(near) == b""
    await asyncio.wait_for(far.wait_closed(), PATIENCE_S)


async def test_a_stream_closes_when_its_handler_returns(pair: Pair) -> None:
    async def answer(stream: Stream) -> None:
        stream.write([await stream.read(100)])

    near = await pair.dialer.dial(*await pair.listen(answer), PATIENCE_S)
    near.write([b"echo"])
    assert await read_to_end(near) == b"echo"


async def test_a_failing_handler_is_reported_and_its_stream_closed(pair: Pair) -> None:
    reports: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: reports.append(context["exception"])
    )

    async def fail(stream: Stream) -> None:
        raise ValueError(stream.peername)

    near = await pair.dialer.dial(*await pair.listen(fail), PATIENCE_S)
    assert await read_to_end(near) == b""
    assert [type(each) for each in reports] == [ValueError]


async def test_peernames_are_addresses(pair: Pair) -> None:
    near, far = await pair.connect()
    host, port = pair.listeners[0].address
    assert near.peername == f"{host}:{port}"
    assert far.peername.rpartition(":")[2].isdigit()


async def test_many_streams_at_once(pair: Pair) -> None:
    async def echo(stream: Stream) -> None:
        while data := await stream.read(1 << 16):
            stream.write([data])
            await stream.drain()

    address = await pair.listen(echo)

    async def call(number: int) -> bytes:
        stream = await pair.dialer.dial(*address, PATIENCE_S)
        pair.streams.append(stream)
        stream.write([str(number).encode() * 1000])
        return await read_exactly(stream, 1000 * len(str(number)))

    answers = await asyncio.gather(*map(call, range(30)))
    assert answers == [str(number).encode() * 1000 for number in range(30)]


async def test_two_connections_talk_over_it(pair: Pair) -> None:
    near, far = await pair.connect()
    clock = asyncio.get_running_loop().time

    def made(role: Role) -> Connection:
        return Connection(role, clock(), name=role.value, device_id="d", software="test")

    async def serve() -> None:
        connection = made(Role.LISTENER)
        while data := await far.read(1 << 16):
            for event in connection.receive(data, clock()):
                if isinstance(event, MessageReceived) and isinstance(event.message, m.Step):
                    row = event.message.rows[0]
                    result = m.Result(row.sequence, row.position, row.position + 1)
                    far.write(connection.send(m.Tokens(event.message.epoch, (result,))))
            far.write(connection.data_to_send())

    serving = asyncio.create_task(serve())
    connection = made(Role.DIALER)
    near.write(connection.start(clock()))
    results: list[m.Result] = []
    position = 0
    while len(results) < 100:
        data = await asyncio.wait_for(near.read(1 << 16), PATIENCE_S)
        for event in connection.receive(data, clock()):
            assert not isinstance(event, Closed)
            if isinstance(event, MessageReceived) and isinstance(event.message, m.Tokens):
                results += event.message.results
                position = event.message.results[0].token
            if isinstance(event, (Opened, MessageReceived)) and len(results) < 100:
                row = m.Row(0, position, 1, True)
                near.write(connection.send(m.Step(1, (row,), bytes(4))))
    assert [result.position for result in results] == list(range(100))
    near.close()
    await asyncio.wait_for(serving, PATIENCE_S)


def test_an_inbox_counts_what_tiny_chunks_really_cost() -> None:
    inbox = Inbox()
    for _ in range(1000):
        inbox.put(b"x")
    assert inbox.unread == 1000
    assert inbox.held > 50_000


# --- TCP only -------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this system has no IPv6 loopback")
async def test_tcp_speaks_ipv6() -> None:
    pair = Pair(TcpTransport(), TcpTransport())
    near, far = await pair.connect("::1")
    assert near.peername.startswith("[::1]:")
    near.write([b"six"])
    assert await read_exactly(far, 3) == b"six"
    await pair.close()


@pytest.mark.parametrize("host", ["a" * 300, "\u2603" * 80, "host.invalid"])
async def test_tcp_names_that_lead_nowhere(host: str) -> None:
    with pytest.raises(PeerLostError):
        await TcpTransport().dial(host, 1, PATIENCE_S)


async def test_tcp_port_out_of_range() -> None:
    with pytest.raises(PeerLostError):
        await TcpTransport().dial(HOST, 70_000, PATIENCE_S)


async def test_tcp_reset_is_a_lost_peer_after_what_arrived_was_read() -> None:
    pair = Pair(TcpTransport(), TcpTransport())
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

    async def keep(stream: Stream) -> None:
        accepted.set_result(stream)
        await stream.wait_closed()

    host, port = await pair.listen(keep)
    raw = socket.create_connection((host, port))
    stream = await asyncio.wait_for(accepted, PATIENCE_S)
    raw.sendall(b"last words")
    assert await read_exactly(stream, 4) == b"last"
    # Lingering for no time: the system sends a reset instead of an end.
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    await asyncio.wait_for(stream.wait_closed(), PATIENCE_S)
    assert await stream.read(100) == b" words"
    with pytest.raises(PeerLostError, match="reset"):
        await stream.read(100)
    with pytest.raises(PeerLostError, match="reset"):
        stream.write([b"x"])
    await pair.close()


# --- memory only: the faults ----------------------------------------------------------


async def memory_pair(network: MemoryNetwork) -> tuple[Stream, Stream, Pair]:
    pair = Pair(network.transport("a"), network.transport("b"))
    near, far = await pair.connect()
    return near, far, pair


async def test_memory_delay_is_waited_for() -> None:
    network = MemoryNetwork()
    near, far, pair = await memory_pair(network)
    network.set_link("a", "b", Link(delay_s=0.05))
    clock = asyncio.get_running_loop().time
    began = clock()
    near.write([b"late"])
    assert await read_exactly(far, 4) == b"late"
    assert clock() - began >= 0.049  # a loop may count in whole milliseconds
    await pair.close()


async def test_memory_jitter_never_reorders() -> None:
    network = MemoryNetwork(seed=3, link=Link(jitter_s=0.01))
    near, far, pair = await memory_pair(network)
    for number in range(200):
        near.write([bytes([number])])
    assert await read_exactly(far, 200) == bytes(range(200))
    await pair.close()


async def test_memory_bandwidth_is_shared_out_over_time() -> None:
    network = MemoryNetwork(link=Link(bytes_per_s=1e6))
    near, far, pair = await memory_pair(network)
    clock = asyncio.get_running_loop().time
    began = clock()
    for _ in range(10):
        near.write([bytes(10_000)])
    assert len(await read_exactly(far, 100_000)) == 100_000
    assert 0.099 <= clock() - began < 1.0
    await pair.close()


async def test_memory_cut_breaks_both_ends_at_once() -> None:
    network = MemoryNetwork(link=Link(delay_s=0.01))
    near, far, pair = await memory_pair(network)
    near.write([b"under way"])
    network.cut("b", "a")
    for stream in (near, far):
        with pytest.raises(PeerLostError, match="cut"):
            await stream.read(10)
        with pytest.raises(PeerLostError, match="cut"):
            stream.write([b"x"])
        await asyncio.wait_for(stream.wait_closed(), PATIENCE_S)
    again, _ = await pair.connect()
    again.write([b"a new one works"])
    await pair.close()


async def test_memory_cut_of_one_leaves_the_others() -> None:
    network = MemoryNetwork()
    near, _, pair = await memory_pair(network)
    other = Pair(network.transport("c"), network.transport("d"))
    spared, _ = await other.connect()
    network.cut("a")
    with pytest.raises(PeerLostError):
        near.write([b"x"])
    spared.write([b"x"])
    await pair.close()
    await other.close()


@pytest.mark.parametrize("count", [0, 1, 7, 10])
async def test_memory_cut_after_so_many_bytes(count: int) -> None:
    network = MemoryNetwork()
    near, far, pair = await memory_pair(network)
    network.cut_after("a", "b", count)
    for byte in b"0123456789x":
        near.write([bytes([byte])])
    assert await read_exactly(far, count) == b"0123456789"[:count]
    for stream in (far, near):
        with pytest.raises(PeerLostError, match="cut"):
            await asyncio.wait_for(stream.read(1), PATIENCE_S)
    await pair.close()


async def test_memory_stall_is_a_black_hole_until_it_ends() -> None:
    network = MemoryNetwork()
    near, far, pair = await memory_pair(network)
    network.stall("a", "b")
    near.write([b"held"])
    far.write([b"the other way is open"])
    assert await read_exactly(near, 21) == b"the other way is open"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(far.read(10), 0.05)
    with pytest.raises(PeerLostError, match="did not answer"):
        await pair.dialer.dial(*pair.listeners[0].address, 0.05)
    near.write([b" back"])
    network.resume("a", "b")
    assert await read_exactly(far, 9) == b"held back"
    await pair.close()


async def test_memory_refused_dials() -> None:
    network = MemoryNetwork()
    _, _, pair = await memory_pair(network)
    network.refuse("b")
    with pytest.raises(PeerLostError, match="refused"):
        await pair.dialer.dial(*pair.listeners[0].address, PATIENCE_S)
    network.refuse("b", False)
    (await pair.dialer.dial(*pair.listeners[0].address, PATIENCE_S)).close()
    await pair.close()


async def test_memory_corrupts_just_the_byte_asked_for_and_the_wire_notices() -> None:
    network = MemoryNetwork()
    near, far, pair = await memory_pair(network)
    message = b"".join(m.encode(m.QueryStats(5)))
    network.corrupt_at("a", "b", len(message) + 3)
    near.write([message, message])
    got = await read_exactly(far, 2 * len(message))
    changed = [at for at, byte in enumerate(message * 2) if byte != got[at]]
    assert changed == [len(message) + 3]
    decoder = FrameDecoder()
    assert len(decoder.feed(got[: len(message)])) == 1
    with pytest.raises(RemoteProtocolError):
        decoder.feed(got[len(message) :])
    await pair.close()


async def test_memory_chance_repeats_with_its_seed() -> None:
    async def run(seed: int) -> bytes:
        network = MemoryNetwork(seed, Link(corruption=0.5))
        near, far, pair = await memory_pair(network)
        for _ in range(50):
            near.write([bytes(4)])
        got = await read_exactly(far, 200)
        await pair.close()
        return got

    first = await run(1)
    assert first == await run(1)
    assert first != await run(2)
    assert 0 < sum(map(bool, first)) < 50
