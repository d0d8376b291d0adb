"""The server around the application: its socket, limits on connections, and an orderly end.

uvicorn speaks HTTP (with h11, which is pure Python). What it has no limit for is added here: how
many connections there may be, and how long the head of a request may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgellm.discovery.addresses import format_address
from edgellm.errors import UsageError

MAX_CONNECTIONS = 512
HEAD_WITHIN_S = 10.0
KEEP_ALIVE_S = 75
MAX_HEAD_BYTES = 32 << 10
END_WITHIN_S = 5
BACKLOG = 256


def _last_words(status: str, message: str, kind: str, code: str) -> bytes:
    """A whole response for a connection that is closed then."""
    told = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    body = json.dumps(told).encode()
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nretry-after: 2\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_FULL = _last_words("503 Service Unavailable", "too many connections.", "unavailable_error", "busy")
_INVALID = _last_words(
    "400 Bad Request", "this is no HTTP.", "invalid_request_error", "invalid_http"
)


class _Protocol(H11Protocol):
    """One connection; closed when there are too many, or when a request does not arrive."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(_FULL)
            transport.close()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle: Any = self.cycle  # None before the first request
        if cycle is not None and not cycle.response_complete:
            self._forget_head()
        elif self._late is None and not self.transport.is_closing():
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_INVALID)
        self.transport.close()

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_WITHIN_S, self._too_late)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to the command that runs it, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(BACKLOG)
        made.setblocking(False)
    except (OSError, OverflowError) as error:
        made.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen on {format_address(host, port)}: {why}.",
            hint="Choose another one with --host and --port.",
        ) from error
    return made


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator[str]:
    """Serve on ``listener`` for as long as the context lasts; yields its URL."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=END_WITHIN_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    address: Any = listener.getsockname()
    try:
        await server.listening.wait()
        yield f"http://{format_address(address[0], address[1])}"
    finally:
        server.should_exit = True
        # Streams have no end of their own: whoever still listens is told by the closed connection.
        for running in list(server.server_state.tasks):
            running.cancel()
        await asyncio.gather(task, return_exceptions=True)
