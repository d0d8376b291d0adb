"""Fetch what an assembly misses from several devices at once.

``scheduler.transfer`` decides which piece is asked of whom; here the questions are sent, the
answers verified and written, and sources come and go. Whatever a source does, short of being the
last one, costs no more than the pieces that were asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.errors import DeadlineError, EdgeError, FetchError, ModelFileError
from edgellm.modelfile.manifest import PIECE_BYTES, ShardManifest
from edgellm.runtime.exchange import ANSWER_WITHIN_S, TensorExchange
from edgellm.runtime.session import Session
from edgellm.scheduler.transfer import SILENCE, Ask, Progress, Transfer
from edgellm.store.assembly import Assembly
from edgellm.store.hubranges import HubPieces
from edgellm.wire.messages import FileWanted

OnProgress = Callable[[Progress], None]
SourceTable = Mapping[str, Callable[[], Awaitable["PieceSource"]]]
"""By the name of a device, or the hub: how to come to it."""


class PieceSource(Protocol):
    """Where pieces may be had."""

    async def held(self, digests: Sequence[str]) -> frozenset[str]:
        """Which of these tensors it has. Raises EdgeError."""

    async def piece(self, digest: str, offset: int, length: int) -> bytes | memoryview | None:
        """Bytes of a tensor, unverified; None if it has none. Raises EdgeError."""


@dataclass(frozen=True, slots=True)
class DeviceSource:
    """Another device."""

    session: Session
    exchange: TensorExchange

    async def held(self, digests: Sequence[str]) -> frozenset[str]:
        return await self.exchange.held_by(self.session, digests)

    async def piece(self, digest: str, offset: int, length: int) -> bytes | memoryview | None:
        return await self.exchange.piece(self.session, digest, offset, length)


@dataclass(frozen=True, slots=True)
class HubSource:
    """The hub, asked by this device itself."""

    pieces: HubPieces

    async def held(self, digests: Sequence[str]) -> frozenset[str]:
        return self.pieces.held(digests)

    async def piece(self, digest: str, offset: int, length: int) -> bytes | memoryview | None:
        return await asyncio.to_thread(self.pieces.read, digest, offset, length)


async def fetch_manifest(
    wanted: FileWanted, session: Session, exchange: TensorExchange
) -> ShardManifest:
    """The manifest, from the coordinator, which alone may say what a stage is made of.

    Raises ModelFileError when it is not the one that was announced, PeerLostError, DeadlineError.
    """
    raw = await fetch_document(wanted, session, exchange)
    return await asyncio.to_thread(ShardManifest.decode, raw)


async def fetch_document(wanted: FileWanted, session: Session, exchange: TensorExchange) -> bytes:
    """The bytes that the coordinator announced by their digest. Raises what ``fetch_manifest``
    does."""
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
    return raw


async def fetch(
    assembly: Assembly, sources: SourceTable, tell: OnProgress, later: SourceTable | None = None
) -> Progress:
    """Fetch all missing pieces. Those of ``later`` are asked for what none of ``sources`` has.

    Raises FetchError when nobody has what is needed.
    """
    async with contextlib.AsyncExitStack() as stack:
        run = _Fetch(assembly, tell)
        stack.push_async_callback(run.stop)
        return await run.run(sources, later or {})


class _Fetch:
    def __init__(self, assembly: Assembly, tell: OnProgress) -> None:
        self._assembly = assembly
        self._tell = tell
        self._transfer = Transfer(assembly.missing, timeout_s=ANSWER_WITHIN_S / SILENCE)
        self._sources: dict[str, PieceSource] = {}
        self._joining = 0
        self._refusals: list[str] = []
        self._failed: EdgeError | None = None
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock = asyncio.get_running_loop().time

    async def run(self, sources: SourceTable, later: SourceTable) -> Progress:
        self._begin(sources)
        while not self._transfer.done:
            if self._failed is not None:
                raise self._failed
            for ask in self._transfer.poll(self._clock()):
                self._spawn(self._fetch(ask))
            self._tell(self._transfer.progress)
            if self._transfer.stuck and not self._joining:
                if not later:
                    raise self._stuck()
                self._begin(later)
                later = {}
            await self._sleep()
        self._tell(self._transfer.progress)
        return self._transfer.progress

    def _begin(self, sources: SourceTable) -> None:
        for name, connect in sources.items():
            self._joining += 1
            self._spawn(self._join(name, connect))

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

    async def _join(self, name: str, connect: Callable[[], Awaitable[PieceSource]]) -> None:
        try:
            source = await connect()
            held = await source.held(sorted(self._transfer.needed))
            self._sources[name] = source
            self._transfer.join(name, held)
        except EdgeError as error:
            self._refusals.append(f"{name}: {error.message.rstrip('.')}")
        finally:
            self._joining -= 1
            self._wake.set()

    async def _fetch(self, ask: Ask) -> None:
        piece = ask.piece
        try:
            source = self._sources[ask.source]
            data = await source.piece(piece.digest, piece.offset, piece.length)
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
