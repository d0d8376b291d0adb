"""Tensors between devices: what peers ask of this one, and what it asks of them.

Tensors are asked for by the digest of their bytes, never by a name or a path. Both sides of the
question are here, because both use the same sessions: a worker fetches from its coordinator over
the connection that the coordinator made. Nothing that arrives is believed: whoever asked checks
every piece against the manifest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

from edgellm.errors import DeadlineError, PeerLostError, RemoteProtocolError
from edgellm.runtime.session import Session
from edgellm.store.sources import TensorServer
from edgellm.wire.messages import (
    DIGEST_BYTES,
    MAX_TENSORS,
    FetchPiece,
    Message,
    PieceData,
    QueryTensors,
    TensorsHeld,
)

MAX_WAITING = 32
"""Questions of one peer that may wait here; who asks more without an answer breaks the protocol."""
ANSWER_WITHIN_S = 60.0
"""Over a slow link, a piece may wait behind five others."""
_Answer = TypeVar("_Answer", TensorsHeld, PieceData)


class TensorExchange:
    """Answers and asks over any number of sessions. Give it their messages with ``take``."""

    def __init__(self, source: TensorServer) -> None:
        self._source = source
        self._numbers = itertools.count(1)
        self._asked: dict[tuple[Session, int], asyncio.Future[TensorsHeld | PieceData]] = {}
        self._waiting: dict[Session, deque[QueryTensors | FetchPiece]] = {}
        self._serving: dict[Session, asyncio.Task[None]] = {}

    # --- asking -----------------------------------------------------------------------

    async def held_by(self, session: Session, digests: Sequence[str]) -> frozenset[str]:
        """Those of ``digests`` that the peer holds. Raises PeerLostError or DeadlineError."""
        held: set[str] = set()
        for begin in range(0, len(digests), MAX_TENSORS):
            some = digests[begin : begin + MAX_TENSORS]
            question = QueryTensors(next(self._numbers), bytes.fromhex("".join(some)))
            answer = await self._ask(session, question, TensorsHeld)
            flags = bytes(answer.payload)
            if len(flags) != len(some):
                raise RemoteProtocolError(
                    f"{session.address} answered for {len(flags)} tensors, not {len(some)}."
                )
            held.update(digest for digest, flag in zip(some, flags, strict=True) if flag)
        return frozenset(held)

    async def piece(
        self, session: Session, digest: str, offset: int, length: int
    ) -> bytes | memoryview | None:
        """Bytes of a tensor as the peer gives them, None if it has none. They are unverified.

        Raises PeerLostError or DeadlineError.
        """
        question = FetchPiece(next(self._numbers), digest, offset, length)
        answer = await self._ask(session, question, PieceData)
        if not answer.found or len(answer.payload) != length:
            return None
        return answer.payload if isinstance(answer.payload, bytes) else memoryview(answer.payload)

    async def _ask(
        self, session: Session, question: QueryTensors | FetchPiece, kind: type[_Answer]
    ) -> _Answer:
        if session.ended:
            raise PeerLostError(f"the connection to {session.address} was lost.")
        key = (session, question.request)
        future: asyncio.Future[TensorsHeld | PieceData] = asyncio.get_running_loop().create_future()
        self._asked[key] = future
        try:
            session.send(question)
            async with asyncio.timeout(ANSWER_WITHIN_S):
                answer = await future
        except TimeoutError as error:
            raise DeadlineError(f"{session.address} did not answer in time.") from error
        finally:
            del self._asked[key]
        if not isinstance(answer, kind):
            raise RemoteProtocolError(f"{session.address} answered another question.")
        return answer

    # --- answering --------------------------------------------------------------------

    def take(self, session: Session, message: Message) -> bool:
        """Take a message, if it is one of tensors. Raises RemoteProtocolError for a flood."""
        if isinstance(message, TensorsHeld | PieceData):
            future = self._asked.get((session, message.request))
            if future is not None and not future.done():  # else whoever asked has given up
                future.set_result(message)
            return True
        if not isinstance(message, QueryTensors | FetchPiece):
            return False
        waiting = self._waiting.setdefault(session, deque())
        if len(waiting) >= MAX_WAITING:
            raise RemoteProtocolError(f"{len(waiting)} questions for tensors wait already.")
        waiting.append(message)
        if session not in self._serving:
            self._serving[session] = asyncio.create_task(self._serve(session, waiting))
        return True

    async def _serve(self, session: Session, waiting: deque[QueryTensors | FetchPiece]) -> None:
        try:
            while waiting and not session.ended:
                question = waiting.popleft()
                if isinstance(question, QueryTensors):
                    session.send(self._held(question))
                else:
                    data = await asyncio.to_thread(
                        self._source.read, question.digest, question.offset, question.length
                    )
                    session.send(PieceData(question.request, data is not None, data or b""))
                    await session.drain()  # one slow reader holds a piece or two, not all it asked
        except PeerLostError:
            pass  # ``closed`` follows
        finally:
            self._serving.pop(session, None)
            if session.ended:
                self._waiting.pop(session, None)

    def _held(self, question: QueryTensors) -> TensorsHeld:
        text = bytes(question.payload).hex()
        step = 2 * DIGEST_BYTES
        digests = [text[at : at + step] for at in range(0, len(text), step)]
        return TensorsHeld(question.request, bytes(self._source.holds(digests)))

    # --- the end ----------------------------------------------------------------------

    def closed(self, session: Session) -> None:
        """The session has ended: nobody answers, and nobody waits for an answer."""
        self._waiting.pop(session, None)
        for (asked, _), future in self._asked.items():
            if asked is session and not future.done():
                future.set_exception(
                    PeerLostError(f"the connection to {session.address} was lost.")
                )

    async def close(self) -> None:
        tasks = list(self._serving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
