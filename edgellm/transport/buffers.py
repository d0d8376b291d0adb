"""What every stream needs between the event loop and its callers: an inbox and a gate.

No input or output here, only futures; each object belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from edgellm.errors import PeerLostError

_CHUNK_COST = 64
"""Bytes that an object and its place in a queue take beyond its contents."""


class Inbox:
    """Received chunks that nobody has read yet, and how the stream ended, if it has."""

    def __init__(self) -> None:
        self.unread = 0
        """Bytes waiting."""
        self.error: PeerLostError | None = None
        self._ended = False
        self._chunks: deque[bytes] = deque()
        self._callback: Callable[[bytes], None] | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def held(self) -> int:
        """Memory taken, about: a flood of one-byte chunks costs far more than its bytes."""
        return self.unread + _CHUNK_COST * len(self._chunks)

    def put(self, chunk: bytes) -> None:
        if self._callback is not None:
            self._callback(chunk)
            return
        self._chunks.append(chunk)
        self.unread += len(chunk)
        self._wake()

    def end(self) -> None:
        """No more will come."""
        if self._ended:
            return
        self._ended = True
        if self._callback is not None:
            self._callback(b"")
        self._wake()

    def hand_to(self, callback: Callable[[bytes], None]) -> None:
        """As ``Stream.receive_with``: what waits goes to ``callback`` now, the rest as it comes."""
        self._callback = callback
        while self._chunks:
            chunk = self._chunks.popleft()
            self.unread -= len(chunk)
            callback(chunk)
        if self._ended:
            callback(b"")

    def fail(self, error: PeerLostError) -> None:
        """The stream broke; the first reason is kept."""
        if self.error is None and not self._ended:
            self.error = error
        self.end()

    async def read(self, max_bytes: int) -> bytes:
        """As ``Stream.read``: what has arrived first, then the error or the end."""
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self._ended:
                return b""
            await self._readable()
        chunk = self._chunks.popleft()
        if len(chunk) > max_bytes:
            self._chunks.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self.unread -= len(chunk)
        return chunk

    async def _readable(self) -> None:
        if self._reader is not None:
            raise RuntimeError("two tasks read one stream")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Gate:
    """Where writers wait while too much is queued."""

    def __init__(self) -> None:
        self._shut = False
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def shut_now(self) -> bool:
        return self._shut

    def shut(self) -> None:
        self._shut = True

    def open(self) -> None:
        self._shut = False
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def passed(self) -> None:
        """Return at once when open, else when it opens."""
        if not self._shut:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
