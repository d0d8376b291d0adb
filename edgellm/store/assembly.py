"""One file put together from pieces: of this disk, of an earlier attempt, of peers.

Blocking, safe for several threads. Every piece is verified before it is written, and written
before it is journaled; the file gets its place among the complete ones only when all are there.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from edgellm.errors import DeviceError
from edgellm.modelfile.manifest import ShardManifest
from edgellm.scheduler.transfer import Piece
from edgellm.store.disk import (
    Progress,
    check_cancelled,
    disk_errors,
    in_threads,
    open_for_reading,
    read_at,
)
from edgellm.store.partial import PartialFile
from edgellm.store.sources import Extent, LocalTensors, Wanted
from edgellm.store.verify import PieceTable

MAX_WRONG = 4
"""Wrong pieces of a tensor, with none right, after which a place is not looked at further."""


class HeldFile:
    """A complete, verified file of the cache that stays there until ``release``."""

    def __init__(self, path: Path, nbytes: int, release: Callable[[], None]) -> None:
        self.path = path
        self.nbytes = nbytes
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """The file may go when room is needed; harmless when repeated."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class _State(enum.Enum):
    OPEN = "open"
    FINISHING = "finishing"
    CLOSED = "closed"


class Assembly:
    """Made by ``ShardCache.assemble``; ends with ``finish`` or ``close``."""

    def __init__(
        self,
        manifest: ShardManifest,
        partial: PartialFile | HeldFile,
        pieces: PieceTable,
        publish: Callable[[PartialFile, ShardManifest], HeldFile],
        on_close: Callable[[], None],
    ) -> None:
        """``partial``: or the complete file itself, where there is nothing to do.

        ``publish`` makes the complete file one of the cache; ``on_close`` is called once.
        """
        self.manifest = manifest
        self.total_bytes = manifest.tensor_bytes
        """Of all tensors, each counted once."""
        self.resumed_bytes = 0
        """Left by an earlier attempt, and verified."""
        self.local_bytes = 0
        """From this disk."""
        self.fetched_bytes = 0
        """Given to ``write``."""
        self._partial = partial
        self._pieces = pieces
        self._publish = publish
        self._on_close = on_close
        self._lock = threading.Lock()
        self._state = _State.OPEN
        self._abandoned = False
        self._done: set[int] = set()
        if isinstance(partial, HeldFile):
            self._done.update(range(len(pieces.pieces)))
            self.local_bytes = self.total_bytes

    # --- what this disk has -----------------------------------------------------------

    def begin(
        self,
        sources: Sequence[LocalTensors],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """Take up what an earlier attempt left, then copy what ``sources`` have.

        ``progress`` counts the bytes that are had, of ``total_bytes``. Raises ``DeviceError``.
        """
        partial = self._partial
        if isinstance(partial, HeldFile):
            if progress is not None:
                progress(self.total_bytes, self.total_bytes)
            return
        with disk_errors("a part of the model cannot be written", partial.path.parent):
            self._done = partial.resume(cancel, None)
            self.resumed_bytes = sum(self._pieces.pieces[n].length for n in self._done)
            if progress is not None:
                progress(self._had_bytes, self.total_bytes)

            def copy(digest: str) -> None:
                self._copy_tensor(digest, partial, sources, progress, cancel)

            wanting = [
                digest
                for digest in self._pieces.tensors
                if not self._done.issuperset(self._pieces.of_tensor(digest))
            ]
            for _ in in_threads(copy, wanting):
                pass

    @property
    def _had_bytes(self) -> int:
        return self.resumed_bytes + self.local_bytes + self.fetched_bytes

    def _copy_tensor(
        self,
        digest: str,
        partial: PartialFile,
        sources: Sequence[LocalTensors],
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> None:
        wanted = Wanted(self._pieces.tensors[digest], partial.names[digest])
        for extent in _candidates(sources, wanted):
            missing = [n for n in self._pieces.of_tensor(digest) if n not in self._done]
            if not missing:
                return
            self._copy_extent(extent, missing, partial, progress, cancel)

    def _copy_extent(
        self,
        extent: Extent,
        numbers: Sequence[int],
        partial: PartialFile,
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> None:
        wrong = right = 0
        try:
            source = open_for_reading(extent.path)
        except OSError:
            return  # gone since it was found: as if it had never been there
        try:
            for number in numbers:
                check_cancelled(cancel)
                piece = self._pieces.pieces[number]
                try:
                    data = read_at(source, piece.length, extent.offset + piece.offset)
                except OSError:
                    data = b""
                if self._pieces.matches(number, data):
                    right += 1
                    self._put(number, data, partial)
                    self._count_local(piece.length, progress)
                else:
                    wrong += 1
                    if wrong >= MAX_WRONG and not right:
                        return
        finally:
            os.close(source)

    def _put(self, number: int, data: bytes | bytearray | memoryview, partial: PartialFile) -> bool:
        """Write a verified piece; False if it is there already."""
        with self._lock:
            if self._state is not _State.OPEN:
                raise DeviceError("the load was given up.")
            if number in self._done:
                return False
            partial.put(number, data)
            self._done.add(number)
            return True

    def _count_local(self, nbytes: int, progress: Progress | None) -> None:
        with self._lock:
            self.local_bytes += nbytes
            if progress is not None:
                progress(self._had_bytes, self.total_bytes)

    # --- what peers have --------------------------------------------------------------

    @property
    def missing(self) -> tuple[Piece, ...]:
        """The pieces that are still to be had, in the order of the file."""
        with self._lock:
            return tuple(p for n, p in enumerate(self._pieces.pieces) if n not in self._done)

    def write(self, piece: Piece, data: bytes | bytearray | memoryview) -> bool:
        """Put a piece that came from somewhere into the file.

        False, and nothing is written, for bytes that are not this piece's, or for a piece that
        this file does not have. True also for one that was there already. Raises ``DeviceError``
        when the disk refuses (what is there stays), or after ``close``.
        """
        number = self._pieces.number(piece)
        if number is None or not self._pieces.matches(number, data):
            return False
        partial = self._partial
        if isinstance(partial, HeldFile):
            return True
        with disk_errors("a part of the model cannot be written", partial.path.parent):
            if self._put(number, data, partial):
                with self._lock:
                    self.fetched_bytes += piece.length
        return True

    # --- the end ----------------------------------------------------------------------

    def finish(self) -> HeldFile:
        """Make the complete file durable and visible, and hold it for the caller.

        Raises ``DeviceError`` while pieces are missing (the assembly stays open), when the disk
        refuses, or when ``close`` was called meanwhile.
        """
        with self._lock:
            if self._state is not _State.OPEN:
                raise DeviceError("the load was given up.")
            lacking = len(self._pieces.pieces) - len(self._done)
            if lacking:
                raise DeviceError(f"{lacking} pieces of the model are still missing.")
            self._state = _State.FINISHING
        try:
            held = self._partial
            if not isinstance(held, HeldFile):
                with disk_errors("a part of the model cannot be written", held.path.parent):
                    held.sync()
                    held = self._publish(held, self.manifest)
        except BaseException:
            self._end()
            raise
        self._end(keep=True)
        if self._abandoned:
            held.release()
            raise DeviceError("the load was given up.")
        return held

    def close(self) -> None:
        """Give up; what is there stays for the next attempt. Quick, harmless when repeated."""
        with self._lock:
            if self._state is _State.FINISHING:
                self._abandoned = True  # ``finish`` ends it
                return
        self._end()

    def _end(self, keep: bool = False) -> None:
        with self._lock:
            if self._state is _State.CLOSED:
                return
            self._state = _State.CLOSED
            if isinstance(self._partial, PartialFile):
                self._partial.close()
            elif not keep:
                self._partial.release()
        self._on_close()


def _candidates(sources: Sequence[LocalTensors], wanted: Wanted) -> Iterator[Extent]:
    for source in sources:
        yield from source.candidates(wanted)
