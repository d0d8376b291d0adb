"""Tensors between two ends of a session: asked for by digest, answered in bounds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable

import pytest

from edgellm.errors import DeadlineError, PeerLostError
from edgellm.runtime import exchange as module
from edgellm.runtime.exchange import MAX_WAITING, TensorExchange
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.base import Stream, Transport
from edgellm.transport.memory import MemoryNetwork
from edgellm.transport.tcp import TcpTransport
from edgellm.wire.frames import Frame
from edgellm.wire.messages import FetchPiece, Message
from tests.inline import until

TENSORS = {hashlib.sha256(data).hexdigest(): data for data in (b"a" * 100, bytes(3 << 20))}
SMALL, LARGE = TENSORS
ABSENT = "0" * 64


class Dictionary:
    """Tensors in memory."""

    def __init__(self) -> None:
        self.reads = 0

    def holds(self, digests: Iterable[str]) -> list[bool]:
        return [digest in TENSORS for digest in digests]

    def read(self, digest: str, offset: int, length: int) -> bytes | None:
        self.reads += 1
        data = TENSORS.get(digest)
        return None if data is None else data[offset : offset + length]


class End:
    """One end of a session that does nothing but exchange tensors."""

    def __init__(self, mute: bool = False) -> None:
        self.source = Dictionary()
        self.exchange = TensorExchange(self.source)
        self.mute = mute

    def on_frame(self, session: Session, frame: Frame) -> None:
        pass

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        if not self.mute:
            assert self.exchange.take(session, message)

    def on_session_closed(self, session: Session) -> None:
        self.exchange.closed(session)


@contextlib.asynccontextmanager
async def ends(kind: str, *, mute: bool = False) -> AsyncIterator[tuple[End, End, Session]]:
    """(who asks, who answers, the asker's session)."""
    network = MemoryNetwork(seed=1)
    transport: Transport = network.transport("b") if kind == "memory" else TcpTransport()
    dialer: Transport = network.transport("a") if kind == "memory" else transport
    asks, answers = End(), End(mute)

    async def serve(stream: Stream) -> None:
        await Session.accept(stream, Introduction("b", "b" * 64, "test"), answers)

    host = "b" if kind == "memory" else "127.0.0.1"
    listener = await transport.listen(host, 0, serve)
    me = Introduction("a", "a" * 64, "test")
    session = await Session.dial(dialer, *listener.address, me, asks)
    try:
        yield asks, answers, session
    finally:
        await session.close()
        await listener.close()
        await answers.exchange.close()


@pytest.mark.parametrize("kind", ["memory", "tcp"])
async def test_pieces_come_as_they_are_there(kind: str) -> None:
    async with ends(kind) as (asks, _, session):
        held = await asks.exchange.held_by(session, [SMALL, ABSENT, LARGE])
        assert held == {SMALL, LARGE}
        assert await asks.exchange.held_by(session, []) == frozenset()
        assert await asks.exchange.piece(session, SMALL, 10, 20) == b"a" * 20
        pieces = await asyncio.gather(
            *[asks.exchange.piece(session, LARGE, at << 19, 1 << 19) for at in range(6)]
        )
        assert b"".join(bytes(piece or b"") for piece in pieces) == TENSORS[LARGE]


async def test_what_is_not_there_is_none() -> None:
    async with ends("memory") as (asks, _, session):
        assert await asks.exchange.piece(session, ABSENT, 0, 10) is None
        assert await asks.exchange.piece(session, SMALL, 95, 10) is None  # beyond its end


async def test_whoever_floods_is_cut_off_and_reads_stay_bounded() -> None:
    async with ends("memory") as (_, answers, session):
        for number in range(3 * MAX_WAITING):
            session.send(FetchPiece(number, LARGE, 0, 1 << 19))
        await until(lambda: session.ended)
        assert answers.source.reads <= MAX_WAITING


async def test_a_lost_peer_ends_the_wait() -> None:
    async with ends("memory", mute=True) as (asks, _, session):
        waiting = asyncio.create_task(asks.exchange.piece(session, SMALL, 0, 10))
        await asyncio.sleep(0.01)
        await session.close()
        with pytest.raises(PeerLostError):
            await waiting
        with pytest.raises(PeerLostError):
            await asks.exchange.held_by(session, [SMALL])


async def test_a_peer_that_says_nothing_is_not_waited_for_longer_than_agreed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ANSWER_WITHIN_S", 0.05)
    async with ends("memory", mute=True) as (asks, _, session):
        with pytest.raises(DeadlineError):
            await asks.exchange.piece(session, SMALL, 0, 10)
