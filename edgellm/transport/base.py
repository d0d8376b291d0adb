"""What a transport is: a way to get ordered, reliable byte streams to and from other devices.

Interfaces only, no input or output; asyncio's rules apply (one task reads a stream, one loop
per stream). Implementations map every failure of their own to ``PeerLostError``, and know
nothing of frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

from edgellm.errors import PeerLostError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""What may wait in one stream for a peer that does not read; a writer that never drains hits it."""


class Stream(Protocol):
    """One connection. All methods are to be called from the event loop's thread."""

    @property
    def peername(self) -> str:
        """The other end, for people: ``host:port``."""
        ...

    @property
    def local(self) -> bool:
        """Whether the other end is on this machine."""
        ...

    @property
    def peer_id(self) -> str | None:
        """The device that the other end has proven to be, 64 hex digits; None where the transport
        proves nothing: within one process."""
        ...

    async def read(self, max_bytes: int) -> bytes:
        """The next 1 to ``max_bytes`` bytes, as soon as there are any; ``b""`` at the end.

        Raises ``PeerLostError`` when the connection broke, after all that had arrived was read.
        """
        ...

    def receive_with(self, callback: Callable[[bytes], None]) -> None:
        """Instead of ``read``: give each chunk to ``callback`` in the turn of the event loop that
        it arrives in, and ``b""`` once at the end. ``error`` then says whether it broke.

        A task that reads costs a token one more turn of the loop at every hop. The callback must
        not raise and must not wait; the stream's own back-pressure does not apply.
        """
        ...

    @property
    def error(self) -> PeerLostError | None:
        """What broke the connection, if something did; NotPairedError when the peer refused us."""
        ...

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Queue buffers, in order; never waits. They must not be changed afterwards.

        Raises ``PeerLostError`` when the stream is closed or broken, and when more than
        ``MAX_BUFFERED_BYTES`` would wait: the stream is then aborted.
        """
        ...

    @property
    def congested(self) -> bool:
        """Whether ``drain`` would wait."""
        ...

    async def drain(self) -> None:
        """Wait until the peer has taken enough for more to be welcome.

        Raises ``PeerLostError`` when the stream is closed or broken.
        """
        ...

    def close(self) -> None:
        """Send what is queued, then close; what cannot be sent within seconds is dropped.

        A waiting ``read`` ends with ``b""``. Closing twice is harmless.
        """
        ...

    async def wait_closed(self) -> None:
        """Wait until the stream is closed, for whatever reason. Raises nothing."""
        ...


OnStream: TypeAlias = Callable[[Stream], Awaitable[None]]
"""Handles one accepted stream; runs as a task of its own, and the stream closes after it."""


class Listener(Protocol):
    @property
    def address(self) -> tuple[str, int]:
        """(host, port) as bound: the port that the system chose when 0 was asked for."""
        ...

    async def close(self) -> None:
        """Accept no more, cancel the handlers that still run, and close their streams."""
        ...


class Transport(Protocol):
    async def dial(self, host: str, port: int, timeout: float) -> Stream:  # noqa: ASYNC109
        """Connect within ``timeout`` seconds. Raises ``PeerLostError``, as NotPairedError where
        the other end is no device of our cluster. One that refuses *us* may say so only later:
        the first read then raises it."""
        ...

    async def listen(self, host: str, port: int, on_stream: OnStream) -> Listener:
        """Accept streams; port 0 lets the system choose. Raises ``PeerLostError``."""
        ...


class Handlers:
    """The tasks that serve a listener's streams: started, reported when they fail, cancelled."""

    def __init__(self, on_stream: OnStream) -> None:
        self._on_stream = on_stream
        self._streams: dict[asyncio.Task[None], Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def start(self, stream: Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._streams[task] = stream
        task.add_done_callback(self._finished)

    async def cancel(self) -> None:
        tasks = [task for task in self._streams if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, stream: Stream) -> None:
        await self._on_stream(stream)

    def _finished(self, task: asyncio.Task[None]) -> None:
        # Here rather than in the task: one that is cancelled before its first step runs nothing.
        self._streams.pop(task).close()
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nobody awaits a handler, so its failure goes where the loop reports such things.
            task.get_loop().call_exception_handler(
                {"message": "the handler of a stream failed", "exception": error, "task": task}
            )
