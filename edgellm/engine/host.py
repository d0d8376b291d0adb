"""Where a stage runs, seen from its node: in a process of its own, or inline for tests.

Both take the messages of ``server.StageServer`` and give its answers as frames, so that a node
can forward them unread. When a stage ends, ``receive`` returns an empty list and ``reason``
says why in words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from edgellm.engine.child import Child
from edgellm.engine.server import EngineTable, StageServer
from edgellm.errors import EdgeError
from edgellm.wire.frames import MAX_PAYLOAD_BYTES, Buffer, Frame, FrameDecoder
from edgellm.wire.messages import (
    LOCAL_KINDS,
    Hidden,
    OpenSequence,
    Step,
    Tokens,
    decode,
    encode,
    kind_of,
)


class StageHost(Protocol):
    """One running stage. One task may send and one may receive at a time."""

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Queue one encoded message; after the stage's end it goes nowhere."""

    @property
    def unsent(self) -> int:
        """Bytes sent that the stage has not taken yet."""

    async def receive(self) -> list[Frame]:
        """The next answers, at least one; empty when the stage has ended."""

    async def stop(self) -> None:
        """End it and free its memory; harmless when it has ended."""

    @property
    def reason(self) -> str:
        """Why it ended, or an empty string while it runs."""


HostFactory = Callable[[str], Awaitable[StageHost]]
"""Starts a stage; the argument is its name for messages to people."""


def _stage_decoder() -> FrameDecoder:
    """Our own stage's frames: of any size that the plan allows, which the next node checks."""
    kinds = (Hidden, Tokens, Step, OpenSequence)
    return FrameDecoder({kind_of(kind): MAX_PAYLOAD_BYTES for kind in kinds})


class ProcessStage:
    """A stage in a child process: a crash, an abort or an OOM kill costs this stage only."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._decoder = _stage_decoder()
        self._reason = ""

    @classmethod
    async def start(cls, name: str) -> ProcessStage:
        """Raises StageError where the process cannot be started."""
        return cls(await Child.start("edgellm.engine.stage_main", name=name))

    def send(self, buffers: Sequence[Buffer]) -> None:
        self._child.write(buffers)

    @property
    def unsent(self) -> int:
        return self._child.unsent

    async def receive(self) -> list[Frame]:
        while True:
            data = await self._child.read()
            if not data:
                self._reason = (await self._child.stop()).reason
                return []
            try:
                frames = self._decoder.feed(data)
            except EdgeError as error:
                await self._child.stop()
                self._reason = f"sent garbage to its node ({error.message})"
                return []
            if frames:
                return frames

    async def stop(self) -> None:
        await self._child.stop()

    @property
    def reason(self) -> str:
        return self._reason


class InlineStage:
    """A stage inside the node's own process. Only for engines without native code (the stub)."""

    def __init__(self, engines: EngineTable) -> None:
        self._server = StageServer(engines)
        self._in = _stage_decoder()
        self._out = _stage_decoder()
        self._answers: asyncio.Queue[list[Frame]] = asyncio.Queue()
        self._reason = ""

    def send(self, buffers: Sequence[Buffer]) -> None:
        if self._reason:
            return
        for frame in self._in.feed(b"".join(buffers)):
            for answer in self._server.handle(decode(frame, LOCAL_KINDS)):
                self._answers.put_nowait(self._out.feed(b"".join(encode(answer))))

    @property
    def unsent(self) -> int:
        return 0

    async def receive(self) -> list[Frame]:
        return await self._answers.get()

    async def stop(self) -> None:
        self.crash("was stopped")

    def crash(self, reason: str) -> None:
        """End at once, as if the process had died for ``reason``."""
        if not self._reason:
            self._reason = reason
            self._answers.put_nowait([])

    @property
    def reason(self) -> str:
        return self._reason
