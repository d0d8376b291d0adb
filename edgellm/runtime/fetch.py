"""Fetch what an assembly misses from several devices at once.

``scheduler.transfer`` decides which piece is asked of whom; here the questions are sent, the
answers verified and written, and sources come and go. Whatever a source does, short of being the
last one, costs no more than the pieces that were asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping

from edgellm.errors import DeadlineError, EdgeError, FetchError, ModelFileError
from edgellm.modelfile.manifest import PIECE_BYTES, ShardManifest
from edgellm.runtime.exchange import ANSWER_WITHIN_S, TensorExchange
from edgellm.runtime.session import Session
from edgellm.scheduler.transfer import SILENCE, Ask, Progress, Transfer
from edgellm.store.assembly import Assembly
from edgellm.wire.messages import FileWanted

OnProgress = Callable[[Progress], None]
SourceTable = Mapping[str, Callable[[], Awaitable[Session]]]
"""By the name of a device: how to get a session with it."""


async def fetch_manifest(
    wanted: FileWanted, session: Session, exchange: TensorExchange
) -> ShardManifest:
    """The manifest, from the coordinator, which alone may say what a stage is made of.

    Raises ModelFileError when it is not the one that was announced, PeerLostError, DeadlineError.
    """
    parts = []
    for offset in range(0, wanted.manifest_bytes, PIECE_BYTES):
        length = min(PIECE_BYTES, wanted.manifest_bytes - offset)
        data = await exchange.piece(session, wanted.manifest, offset, length)
        if data is None:
            raise FetchError("the coordinator does not have the manifest that it announced.")
        parts.append(bytes(data))
    raw = b"".join(parts)
    if hashlib.sha256(raw).hexdigest() != wanted.manifest:
        raise ModelFileError("the manifest is not the one that was announced.")
    return await asyncio.to_thread(ShardManifest.decode, raw)


async def fetch(
    assembly: Assembly, sources: SourceTable, exchange: TensorExchange, tell: OnProgress
) -> Progress:
    """Fetch all missing pieces. Raises FetchError when nobody has what is needed."""
    async with contextlib.AsyncExitStack() as stack:
        run = _Fetch(assembly, exchange, tell)
        stack.push_async_callback(run.stop)
        return await run.run(sources)


class _Fetch:
    def __init__(self, assembly: Assembly, exchange: TensorExchange, tell: OnProgress) -> None:
        self._assembly = assembly
        self._exchange = exchange
        self._tell = tell
        self._transfer = Transfer(assembly.missing, timeout_s=ANSWER_WITHIN_S / SILENCE)
        self._sessions: dict[str, Session] = {}
        self._joining = 0
        self._refusals: list[str] = []
        self._failed: EdgeError | None = None
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock = asyncio.get_running_loop().time

    async def run(self, sources: SourceTable) -> Progress:
        for name, connect in sources.items():
            self._joining += 1
            self._spawn(self._join(name, connect))
        while not self._transfer.done:
            if self._failed is not None:
                raise self._failed
            for ask in self._transfer.poll(self._clock()):
                self._spawn(self._fetch(ask))
            self._tell(self._transfer.progress)
            if self._transfer.stuck and not self._joining:
                raise self._stuck()
            await self._sleep()
        self._tell(self._transfer.progress)
        return self._transfer.progress

    def _stuck(self) -> FetchError:
        reasons = "; ".join([self._transfer.stuck, *self._refusals])
        return FetchError(
            f"its layers cannot be fetched: {reasons}.",
            hint="Look whether the devices that hold the model still run, then try again.",
        )

    async def _sleep(self) -> None:
        """Until something happened, or the transfer wants to be asked again."""
        at = self._transfer.wake_at()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(at):
                await self._wake.wait()
        self._wake.clear()

    async def _join(self, name: str, connect: Callable[[], Awaitable[Session]]) -> None:
        try:
            session = await connect()
            held = await self._exchange.held_by(session, sorted(self._transfer.needed))
            self._sessions[name] = session
            self._transfer.join(name, held)
        except EdgeError as error:
            self._refusals.append(f"{name}: {error.message.rstrip('.')}")
        finally:
            self._joining -= 1
            self._wake.set()

    async def _fetch(self, ask: Ask) -> None:
        piece = ask.piece
        try:
            session = self._sessions[ask.source]
            data = await self._exchange.piece(session, piece.digest, piece.offset, piece.length)
            if data is None:
                self._transfer.refused(ask.source, piece, self._clock())
                return
            try:
                good = await asyncio.to_thread(self._assembly.write, piece, data)
            except EdgeError as error:  # our own disk: no other source would help
                self._failed = self._failed or error
                return
            self._transfer.arrived(ask.source, piece, good, self._clock())
            if not good:
                self._refusals.append(f"{ask.source} sent other bytes than it should")
        except DeadlineError:
            pass  # the transfer has its own opinion of slow sources
        except EdgeError as error:
            self._transfer.leave(ask.source)
            self._refusals.append(f"{ask.source}: {error.message.rstrip('.')}")
        finally:
            self._wake.set()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
