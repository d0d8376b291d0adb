"""How fast the way to another device is: round trip and bandwidth over an open session.

Echoes go out as ordinary messages, so what is measured is what hidden rows will meet: the same
framing, the same connection, the same event loops at both ends. The arithmetic is pure; the
meter only sends, waits and looks at the loop's clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgellm.errors import DeadlineError, PeerLostError
from edgellm.runtime.session import Session
from edgellm.wire.messages import Echo, EchoBack

SMALL_BYTES = 4 << 10
"""One token's hidden row, of a model 2048 wide in float16."""
PAYLOAD_BYTES = 256 << 10
"""Largest single payload: a chunk of 64 such rows."""
FIRST_BURST_BYTES = 32 << 10
LAST_BURST_BYTES = 16 << 20
GROWTH = 4
ENOUGH_S = 0.08
"""A burst that took so long tells the bandwidth."""
PAUSE_S = 0.006
"""Between two round trips: a token's row, too, comes to processes that have waited for it."""
ROUND_TRIPS = 10
ROUND_TRIPS_WITHIN_S = 0.15
WITHIN_S = 3.0
"""A link that is too slow for anything else is told by what arrived until then."""
_MOST_LATENCY = 0.9


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """One direction of a link, from here to the peer."""

    round_trip_s: float
    """A message of one token's size there, and a very small one back."""
    bytes_per_s: float
    """Payload of messages of a prompt chunk's size, several under way."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Payload sent at once, and how long it took until all of it was answered for."""

    nbytes: int
    seconds: float


def usual_round_trip(seconds: Sequence[float]) -> float:
    """Of round trips in the order they were made: the median, without the first where there are
    others, because it found sleeping processors and radios."""
    return statistics.median(seconds[1:] or seconds)


def bandwidth(burst: Burst, round_trip_s: float) -> float:
    """Bytes per second once the bytes flow. What jitter may have added to the round trip is never
    believed to be nearly all of the time."""
    flowing = max(burst.seconds - round_trip_s, burst.seconds * (1.0 - _MOST_LATENCY))
    return burst.nbytes / max(flowing, 1e-9)


def unloaded_round_trip(round_trip_s: float, bytes_per_s: float) -> float:
    """Of a message of no size, by what was measured with one of a token's: the time that its bytes
    took to leave counts with every message by itself, and must not count twice."""
    return max(0.0, round_trip_s - SMALL_BYTES / bytes_per_s)


def rounds_of(count: int) -> list[list[tuple[int, int]]]:
    """All (from, to) of so many devices, in rounds in which each has to do with one other at most:
    the way in which everyone of a tournament plays everyone, there and back."""
    seats = list(range(count + count % 2))  # with an odd number, whoever meets the last one rests
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        pairs = [(a, b) for a, b in met if max(a, b) < count]
        rounds += [pairs, [(b, a) for a, b in pairs]]
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def next_burst(done: Burst, round_trip_s: float, left_s: float) -> int | None:
    """Bytes of the burst to follow; None where ``done`` tells enough or ``left_s`` is too short."""
    flowing = max(0.0, done.seconds - round_trip_s)
    if flowing >= ENOUGH_S or done.nbytes >= LAST_BURST_BYTES:
        return None
    if round_trip_s + GROWTH * flowing > left_s:
        return None
    return min(done.nbytes * GROWTH, LAST_BURST_BYTES)


class LinkMeter:
    """Measures over any number of sessions, one at a time; one event loop.

    Whoever handles a session's messages gives ``on_echo_back`` what comes back.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Session, asyncio.Future[float]]] = {}
        self._watched: weakref.WeakSet[Session] = weakref.WeakSet()
        self._turn = asyncio.Lock()

    def on_echo_back(self, message: EchoBack) -> None:
        """An echo has come back. One that nobody waits for (any more) is passed over."""
        _, future = self._waiting.get(message.nonce, (None, None))
        if future is not None and not future.done():
            # The time now, not when its task runs: that may be behind others' work.
            future.set_result(time.perf_counter())

    def time(self, session: Session, told: Callable[[float], None]) -> None:
        """Send an empty echo behind what went out over the session just now, and tell the seconds
        until it is back; never, where the session ends before."""
        if session.ended:
            return
        self._watch(session)
        began = time.perf_counter()
        nonce = self._send(session, memoryview(b""))

        def over(future: asyncio.Future[float]) -> None:
            self._waiting.pop(nonce, None)
            if not future.cancelled() and future.exception() is None:
                told(future.result() - began)

        self._waiting[nonce][1].add_done_callback(over)

    def _watch(self, session: Session) -> None:
        if session not in self._watched:
            self._watched.add(session)
            session.on_close(lambda reason: self._lost(session, reason))

    async def measure(self, session: Session) -> LinkFigures:
        """Measure the link to the session's peer: under half a second, on a bad link 3 s.

        Its bandwidth is shared with whatever else the session carries at the time. Waits while
        another link is measured. Raises PeerLostError when the session ends, DeadlineError when
        nothing comes back.
        """
        async with self._turn:
            self._watch(session)
            return await self._measure(session)

    async def _measure(self, session: Session) -> LinkFigures:
        began = time.perf_counter()  # a loop's own clock may tick in milliseconds
        trips: list[float] = []
        bursts: list[Burst] = []
        burst_began = began
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WITHIN_S):
                small = secrets.token_bytes(SMALL_BYTES)
                while (
                    len(trips) <= ROUND_TRIPS and time.perf_counter() - began < ROUND_TRIPS_WITHIN_S
                ):
                    trips.append(await self._burst(session, small, SMALL_BYTES))
                    await asyncio.sleep(PAUSE_S)
                round_trip_s = usual_round_trip(trips)
                large = secrets.token_bytes(PAYLOAD_BYTES)  # a VPN may compress what is regular
                size: int | None = FIRST_BURST_BYTES
                while size is not None:
                    burst_began = time.perf_counter()
                    bursts.append(Burst(size, await self._burst(session, large, size)))
                    left_s = WITHIN_S - (time.perf_counter() - began)
                    size = next_burst(bursts[-1], round_trip_s, left_s)
        if not trips:
            raise DeadlineError(f"{session.address} sent no echo back within {WITHIN_S:g} s.")
        round_trip_s = usual_round_trip(trips)
        if not bursts:  # not even the first one arrived: it is slower than this
            return LinkFigures(
                round_trip_s, FIRST_BURST_BYTES / (time.perf_counter() - burst_began)
            )
        return LinkFigures(round_trip_s, bandwidth(bursts[-1], round_trip_s))

    async def _burst(self, session: Session, payload: bytes, nbytes: int) -> float:
        """Send so many bytes in payloads as large as ``payload``; seconds until all came back."""
        began = time.perf_counter()
        nonces: list[int] = []
        last = began
        view = memoryview(payload)
        try:
            for at in range(0, nbytes, len(payload)):
                nonces.append(self._send(session, view[: nbytes - at]))
                await session.drain()
            for nonce in nonces:
                last = max(last, await self._waiting[nonce][1])
        finally:
            for nonce in nonces:
                _, future = self._waiting.pop(nonce)
                if not future.cancel() and not future.cancelled():
                    future.exception()  # the first one's was raised
        return last - began

    def _send(self, session: Session, payload: memoryview) -> int:
        """Send an echo and expect it back. Returns its nonce, which no other peer can guess."""
        if session.ended:
            raise PeerLostError(f"the connection to {session.address} was lost.")
        nonce = secrets.randbits(32)
        while nonce in self._waiting:
            nonce = secrets.randbits(32)
        self._waiting[nonce] = session, asyncio.get_running_loop().create_future()
        session.send(Echo(nonce, payload))
        return nonce

    def _lost(self, session: Session, reason: str) -> None:
        for of, future in self._waiting.values():
            if of is session and not future.done():
                future.set_exception(
                    PeerLostError(f"the connection to {session.address} was lost ({reason}).")
                )
