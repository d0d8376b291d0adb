"""What is special to the secure transport: who is let in, who is told what, and what garbage costs.

Runs on every event loop, see ``conftest``.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from edgellm.errors import NotPairedError, PeerLostError
from edgellm.runtime.session import Introduction, Session
from edgellm.transport import secure
from edgellm.transport.base import Listener, OnStream, Stream, Transport
from edgellm.transport.secure import MAX_PAIRINGS, MAX_UNSETTLED, SecureTransport
from edgellm.transport.tcp import TcpTransport
from edgellm.wire.frames import Frame
from edgellm.wire.messages import Message
from tests.circles import Circle, device

HOST = "127.0.0.1"
PATIENCE_S = 5.0
ALICE, BOB, EVE = device("alice"), device("bob"), device("eve")


class House:
    """Alice, listening; she trusts Bob."""

    def __init__(self) -> None:
        self.circle = Circle(ALICE, BOB)
        self.streams: list[Stream] = []
        self.pairings: list[Stream] = []
        self.lines: list[str] = []
        self.clients: list[Client] = []
        self.transport = SecureTransport(
            self.circle.credentials, self._on_pairing, self.lines.append
        )
        self.listener: Listener

    async def _on_stream(self, stream: Stream) -> None:
        self.streams.append(stream)
        while data := await stream.read(1 << 16):
            stream.write([data])

    async def _on_pairing(self, stream: Stream) -> None:
        self.pairings.append(stream)
        while data := await stream.read(1 << 16):
            stream.write([data])

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.address

    async def raw(self) -> Client:
        self.clients.append(Client(*await asyncio.open_connection(*self.address)))
        return self.clients[-1]

    async def close(self) -> None:
        await self.listener.close()
        for client in self.clients:
            client.close()


class Client:
    """A connection of somebody who speaks no TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def closed_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self.reader.read(1 << 16) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.writer.transport.abort()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    made.listener = await made.transport.listen(HOST, 0, made._on_stream)
    async with asyncio.timeout(60):
        yield made
    await made.close()


Listen = Callable[[Transport, OnStream], Awaitable[tuple[str, int]]]


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """Opens further listeners, at the address returned, until the test ends."""
    listeners: list[Listener] = []

    async def opened(transport: Transport, on_stream: OnStream) -> tuple[str, int]:
        listeners.append(await transport.listen(HOST, 0, on_stream))
        return listeners[-1].address

    yield opened
    for each in listeners:
        await each.close()


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    monkeypatch.setattr(secure, "HANDSHAKE_S", 0.3)
    yield 0.3


def bob() -> SecureTransport:
    return SecureTransport(Circle(BOB, ALICE).credentials)


def eve() -> SecureTransport:
    return SecureTransport(Circle(EVE, ALICE).credentials)


async def echo(stream: Stream, said: bytes) -> bytes:
    stream.write([said])
    return await read(stream, len(said))


async def read(stream: Stream, count: int) -> bytes:
    got = b""
    while len(got) < count:
        got += await asyncio.wait_for(stream.read(1 << 16), PATIENCE_S)
    return got


# --- who is let in ----------------------------------------------------------------------


async def test_both_ends_know_the_other(house: House) -> None:
    stream = await bob().dial(*house.address, PATIENCE_S)
    assert await echo(stream, b"hello") == b"hello"
    assert stream.peer_id == ALICE.device_id
    assert [each.peer_id for each in house.streams] == [BOB.device_id]
    assert stream.local
    stream.close()


async def test_an_unpaired_dialer_learns_it_from_its_first_read(house: House) -> None:
    stream = await eve().dial(*house.address, PATIENCE_S)
    with pytest.raises(NotPairedError, match="does not take this device") as caught:
        await asyncio.wait_for(stream.read(10), PATIENCE_S)
    assert "edgellm invite" in str(caught.value)
    assert isinstance(stream.error, NotPairedError)
    with pytest.raises(NotPairedError):
        stream.write([b"x"])
    await asyncio.wait_for(stream.wait_closed(), PATIENCE_S)
    assert house.streams == []


async def test_an_unpaired_dialer_that_talks_at_once_learns_it_too(house: House) -> None:
    # What it sent lies unread when it is refused: the alert must not get lost for that.
    for _ in range(10):
        stream = await eve().dial(*house.address, PATIENCE_S)
        stream.write([bytes(8_000_000)])
        with pytest.raises(NotPairedError):
            await asyncio.wait_for(stream.read(10), PATIENCE_S)
        stream.close()


async def test_a_dialer_refuses_who_is_not_of_its_cluster(house: House) -> None:
    circle = Circle(BOB, EVE)
    with pytest.raises(NotPairedError, match="is not a device of this cluster"):
        await SecureTransport(circle.credentials).dial(*house.address, PATIENCE_S)
    await asyncio.sleep(0.1)
    assert house.streams == []
    assert house.lines == ["a device at 127.0.0.1 that is not paired tried to connect"]


async def test_a_device_that_was_forgotten_gets_no_further_connection(house: House) -> None:
    dialer = bob()
    stream = await dialer.dial(*house.address, PATIENCE_S)
    assert await echo(stream, b"hello") == b"hello"
    house.circle.forget(BOB)
    again = await dialer.dial(*house.address, PATIENCE_S)
    with pytest.raises(NotPairedError):
        await again.read(10)
    stream.close()


async def test_a_device_that_was_just_paired_gets_in(house: House) -> None:
    house.circle.trusted |= {EVE.device_id: EVE.certificate}
    stream = await eve().dial(*house.address, PATIENCE_S)
    assert await echo(stream, b"me too") == b"me too"
    stream.close()


async def test_refusals_are_reported_once_a_minute(house: House) -> None:
    for _ in range(5):
        stream = await eve().dial(*house.address, PATIENCE_S)
        with pytest.raises(NotPairedError):
            await stream.read(10)
    assert house.lines == ["a device at 127.0.0.1 that is not paired tried to connect"]


async def test_garbage_is_no_refusal(house: House) -> None:
    client = await house.raw()
    client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await client.closed_within(PATIENCE_S)
    assert house.lines == []


class Nobody:
    """A session's handler that nothing reaches."""

    def on_frame(self, session: Session, frame: Frame) -> None:
        raise AssertionError(frame)

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        raise AssertionError(message)

    def on_session_closed(self, session: Session) -> None:
        pass


async def test_a_session_says_that_the_two_are_not_paired(house: House) -> None:
    me = Introduction("eve", EVE.device_id, "test")
    with pytest.raises(NotPairedError, match="does not take this device"):
        await Session.dial(eve(), *house.address, me, Nobody())
    stranger = SecureTransport(Circle(EVE).credentials)
    with pytest.raises(NotPairedError, match="is not a device of this cluster"):
        await Session.dial(stranger, *house.address, me, Nobody())


# --- other ends -------------------------------------------------------------------------


async def test_a_peer_that_speaks_no_tls_is_not_called_unpaired(listen: Listen) -> None:
    async def greet(stream: Stream) -> None:
        stream.write([b"220 mail.example ESMTP\r\n"])
        await stream.read(1000)

    address = await listen(TcpTransport(), greet)
    with pytest.raises(PeerLostError, match="does not speak TLS") as caught:
        await bob().dial(*address, PATIENCE_S)
    assert not isinstance(caught.value, NotPairedError)


async def test_a_peer_that_hangs_up_in_the_handshake_is_lost(listen: Listen) -> None:
    async def leave(stream: Stream) -> None:
        await stream.read(10)

    address = await listen(TcpTransport(), leave)
    with pytest.raises(PeerLostError) as caught:
        await bob().dial(*address, PATIENCE_S)
    assert not isinstance(caught.value, NotPairedError)


async def test_a_peer_that_says_nothing_is_given_up(listen: Listen) -> None:
    async def wait(stream: Stream) -> None:
        await stream.wait_closed()

    address = await listen(TcpTransport(), wait)
    with pytest.raises(PeerLostError, match="did not answer"):
        await bob().dial(*address, 0.1)


class ByHand:
    """The dialing end of TLS, for what our own never does."""

    def __init__(self, circle: Circle) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = circle.credentials.client_context().wrap_bio(self.incoming, self.outgoing)

    def send(self, plain: bytes) -> bytes:
        self.tls.write(plain)
        return self.outgoing.read()


async def shaken_by_hand(
    circle: Circle, address: tuple[str, int]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, ByHand]:
    reader, writer = await asyncio.open_connection(*address)
    hand = ByHand(circle)
    while True:
        try:
            hand.tls.do_handshake()
        except ssl.SSLWantReadError:
            writer.write(hand.outgoing.read())
            hand.incoming.write(await reader.read(1 << 16))
        else:
            return reader, writer, hand


async def test_who_is_refused_may_still_be_talking(house: House) -> None:
    """A connection that is closed over unread bytes is reset, and on its way a reset may overtake
    the alert that says why."""
    reader, writer, hand = await shaken_by_hand(Circle(EVE, ALICE), house.address)
    writer.write(hand.outgoing.read())  # ends the handshake: now she knows
    for _ in range(10):
        await asyncio.sleep(0.01)
        writer.write(hand.send(bytes(1000)))
    writer.write_eof()
    hand.incoming.write(await reader.read(-1))  # to the end, which is no reset
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        hand.tls.read(1)
    writer.close()


async def test_a_connection_that_is_cut_is_no_end(listen: Listen) -> None:
    """Whoever sits between two devices can end their TCP connection, but not in their name."""
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

    async def keep(stream: Stream) -> None:
        accepted.set_result(stream)
        await stream.wait_closed()

    address = await listen(SecureTransport(Circle(ALICE, BOB).credentials), keep)
    _, writer, tls = await shaken_by_hand(Circle(BOB, ALICE), address)
    writer.write(tls.send(b"so far"))
    writer.close()
    stream = await asyncio.wait_for(accepted, PATIENCE_S)
    assert await stream.read(100) == b"so far"
    with pytest.raises(PeerLostError, match="without a farewell"):
        await stream.read(100)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this system has no IPv6 loopback")
async def test_ipv6(house: House) -> None:
    listener = await house.transport.listen("::1", 0, house._on_stream)
    stream = await bob().dial(*listener.address, PATIENCE_S)
    assert await echo(stream, b"six") == b"six"
    assert stream.peername.startswith("[::1]:")
    assert stream.local
    stream.close()
    await listener.close()


# --- pairing ----------------------------------------------------------------------------


async def test_a_pairing_gets_its_bytes_as_they_came(house: House) -> None:
    stream = await TcpTransport().dial(*house.address, PATIENCE_S)
    stream.write([b"EG"])
    await asyncio.sleep(0.05)
    assert house.pairings == []
    stream.write([b"P1 and more"])
    assert await read(stream, 13) == b"EGP1 and more"
    assert house.pairings[0].peer_id is None
    assert house.streams == []
    stream.close()


async def test_pairings_are_few(house: House) -> None:
    clients = [await house.raw() for _ in range(MAX_PAIRINGS + 3)]
    for client in clients:
        client.writer.write(b"EGP1")
    got = await asyncio.gather(*[client.closed_within(0.3) for client in clients])
    # The others read the echo, which is no end.
    assert got.count(True) == 3
    assert len(house.pairings) == MAX_PAIRINGS


async def test_without_pairing_there_is_none() -> None:
    house = House()
    house.transport = SecureTransport(house.circle.credentials)
    house.listener = await house.transport.listen(HOST, 0, house._on_stream)
    client = await house.raw()
    client.writer.write(b"EGP1")
    assert await client.closed_within(PATIENCE_S)
    await house.close()


# --- garbage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [b"\x00", b"EGP2", b"EGX", b"\x17\x03\x03\x00\x10" + bytes(16), b"\x16" + b"\xff" * 600],
    ids=["zero", "another pairing", "not quite", "data without handshake", "no handshake"],
)
async def test_garbage_is_closed_at_once(house: House, said: bytes) -> None:
    client = await house.raw()
    client.writer.write(said)
    assert await client.closed_within(0.1)


async def test_random_bytes_reach_nobody(house: House) -> None:
    chance = random.Random(4)
    for _ in range(300):
        client = await house.raw()
        first = chance.choice([b"", b"\x16", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01"])
        client.writer.write(first + chance.randbytes(chance.randrange(1, 2000)))
        client.writer.write_eof()
        assert await client.closed_within(1.0)
    assert house.streams == house.pairings == []
    stream = await bob().dial(*house.address, PATIENCE_S)
    assert await echo(stream, b"still here") == b"still here"
    stream.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"EG", b"\x16", b"\x16\x03\x01\x02\x00"],
    ids=["nothing", "half a pairing", "one byte", "half a hello"],
)
async def test_who_dawdles_is_closed(house: House, short_patience: float, said: bytes) -> None:
    client = await house.raw()
    client.writer.write(said)
    assert not await client.closed_within(short_patience / 2)
    assert await client.closed_within(short_patience)


async def test_a_pairing_and_a_stream_may_take_their_time(
    house: House, short_patience: float
) -> None:
    pairing = await TcpTransport().dial(*house.address, PATIENCE_S)
    stream = await bob().dial(*house.address, PATIENCE_S)
    pairing.write([b"EGP1"])
    assert await pairing.read(10) == b"EGP1"
    await asyncio.sleep(1.5 * short_patience)
    assert await echo(pairing, b"still") == b"still"
    assert await echo(stream, b"there") == b"there"
    pairing.close()
    stream.close()


async def test_a_flood_of_silent_connections_locks_nobody_out(house: House) -> None:
    clients = [await house.raw() for _ in range(3 * MAX_UNSETTLED)]
    stream = await bob().dial(*house.address, PATIENCE_S)
    assert await echo(stream, b"through") == b"through"
    closed = await asyncio.gather(*[client.closed_within(0.5) for client in clients])
    assert closed.count(False) <= MAX_UNSETTLED
    # The oldest went first.
    assert closed == sorted(closed, reverse=True)
    stream.close()


async def test_closing_the_listener_closes_whoever_waits(house: House) -> None:
    silent = await house.raw()
    pairing = await house.raw()
    pairing.writer.write(b"EGP1")
    assert await pairing.reader.read(4) == b"EGP1"
    await house.listener.close()
    assert await silent.closed_within(1.0)
    assert await pairing.closed_within(1.0)
