"""Server-sent events to one client, and the wait for its leaving.

What is made for a client waits in a box of bounded size, and each send has a limit in time: a slow
or vanished client is cut off, and holds up nobody. Comments keep idle connections open.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from edgellm.api.errors import ApiError, of_bug, of_edge
from edgellm.errors import EdgeError

KEEP_ALIVE_S = 10.0
SEND_WITHIN_S = 30.0
MOST_PENDING_BYTES = 1 << 20
_COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-store",
    "x-accel-buffering": "no",  # a proxy in between passes events on as they come
}


class SlowClientError(Exception):
    """It does not read what it asked for."""


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event."""
    head = f"event: {name}\n" if name else ""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"{head}data: {body}\n\n".encode()


class Outbox:
    """Events for one client, oldest first."""

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._bytes = 0
        self._news = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Raises SlowClientError where too much waits."""
        self._bytes += len(data)
        if self._bytes > MOST_PENDING_BYTES:
            raise SlowClientError
        self._events.append(data)
        self._news.set()

    def take(self) -> bytes:
        """All that waits, as one."""
        data = b"".join(self._events)
        self._events.clear()
        self._bytes = 0
        self._news.clear()
        return data

    async def wait(self) -> None:
        await self._news.wait()


Producer = Callable[[Outbox], Awaitable[None]]


async def left(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def as_error(error: BaseException) -> ApiError:
    """Any failure as what its client is told."""
    if isinstance(error, ApiError):
        return error
    return of_edge(error) if isinstance(error, EdgeError) else of_bug(error)


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())


async def while_there(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of ``work``, which is cancelled when the client leaves (ClientDisconnect)."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(left(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task, watcher)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what runs, and see it end: a stage must be free of it before anything else."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends what ``produce`` puts into the box. An error before the first event is an ordinary
    error response; a later one is an event."""

    def __init__(
        self,
        produce: Producer,
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        send_within_s: float = SEND_WITHIN_S,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._on_end = on_end
        self._produce = produce
        self._keep_alive_s = keep_alive_s
        self._send_within_s = send_within_s
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        box = Outbox()
        producer: asyncio.Future[None] = asyncio.ensure_future(self._produce(box))
        watcher = asyncio.create_task(left(receive))
        try:
            await self._pass_on(box, producer, watcher, send)
            if producer.done() and not producer.cancelled():
                await self._conclude(producer.exception(), scope, receive, send)
        except (TimeoutError, SlowClientError):
            pass  # the connection is of no use: it is closed unfinished, which the client sees
        finally:
            self._on_end()
            await _end(producer, watcher)

    async def _pass_on(
        self,
        box: Outbox,
        producer: asyncio.Future[None],
        watcher: asyncio.Future[None],
        send: Send,
    ) -> None:
        """Until the producer has ended and all is sent, or the client has left."""
        while not watcher.done():
            news = asyncio.ensure_future(box.wait())
            done, _ = await asyncio.wait(
                (news, producer, watcher),
                timeout=self._keep_alive_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            news.cancel()
            data = box.take()
            if data or not done:
                await self._send(send, data or _COMMENT)
            if producer.done() and not data:
                return

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._send_within_s):
            if not self._begun:
                self._begun = True
                raw = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _conclude(
        self, error: BaseException | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if isinstance(error, SlowClientError):
            raise error
        if error is None:
            await self._send(send, b"", more=False)
        elif not self._begun:
            await error_response(as_error(error))(scope, receive, send)
        else:
            await self._send(send, event(as_error(error).body()), more=False)
