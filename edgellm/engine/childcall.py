"""Questions to a helper process, with a deadline each. The format is in ``childmessages.py``.

A child that misses its deadline is killed. Errors raised in the child arrive as the same
typed errors; its death arrives as a StageError with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from edgellm.engine.child import Child
from edgellm.engine.childmessages import MessageReader, pack_message
from edgellm.errors import DeadlineError, StageError, error_from_dict


class ChildCaller:
    """A helper process that answers one call at a time. End it with ``stop``."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._messages = MessageReader()
        self._lock = asyncio.Lock()
        self._last_call = 0

    @classmethod
    async def start(
        cls,
        module: str,
        *,
        name: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> ChildCaller:
        """See ``Child.start``."""
        child = await Child.start(
            module, name=name, arguments=arguments, environment=dict(environment or {})
        )
        return cls(child)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.exit is None

    async def stop(self) -> None:
        await self._child.stop()

    async def call(self, what: str, seconds: float, /, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises the error that the child raised; DeadlineError after ``seconds`` (the
        child is dead then); StageError with the reason when the child died.
        """
        async with self._lock:
            self._last_call += 1
            request = pack_message({**arguments, "call": self._last_call, "what": what})
            try:
                async with asyncio.timeout(seconds):
                    self._child.write(request)
                    await self._child.drain()
                    return await self._answer(self._last_call)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
                raise DeadlineError(
                    f"{self._child.name} did not answer within {seconds:g} s."
                ) from None

    async def _answer(self, call: int) -> dict[str, Any]:
        while True:
            data = await self._child.read()
            if not data:
                ended = await self._child.wait()
                raise StageError(f"{self._child.name} {ended.reason}.")
            try:
                messages = self._messages.feed(data)
            except StageError:
                self._child.kill()
                raise
            for message in messages:
                if message.get("call") != call:
                    continue  # the answer to a call that was cancelled
                if isinstance(message.get("error"), dict):
                    raise error_from_dict(message["error"])
                return message
