"""The cache of a node: files of tensors, each named by its manifest's digest.

Blocking, safe for several threads; a folder belongs to one process. Below it:

- ``shards/DIGEST.gguf``, complete files only, moved here by one rename after they are on the disk;
  beside each a note (``.json``) of which tensor lies where
- ``partial/``, files in the making, that a later attempt resumes

The least recently used go first when room is needed, and never one that is held. A file is
verified, every byte of it, each time before it is handed out.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgellm.modelfile.manifest import ShardManifest
from edgellm.modelfile.model import Model
from edgellm.store.assembly import Assembly, HeldFile
from edgellm.store.disk import Progress, check_cancelled, disk_errors, reading
from edgellm.store.files import CacheFiles
from edgellm.store.partial import PartialFile
from edgellm.store.sources import LocalTensors, ModelTensors, read_extent
from edgellm.store.verify import PieceTable, frame_is_good

_LOCK_POLL_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardCache:
    """See the module. ``limit_bytes`` is for all files together, complete or not."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._files = CacheFiles(folder, limit_bytes)
        self._lock = threading.Lock()
        self._file_locks: dict[str, threading.Lock] = {}
        """By digest: who has it may read and write that file."""
        self._room = threading.Lock()
        """From looking for room until it is taken."""

    def sweep(self, now: float | None = None) -> None:
        """Once, when the node starts: learn what is there, remove what a crash left behind.

        Unfinished files stay for a resume, unless they are older than a week or beyond the limit.
        ``now``: seconds since 1970, by default the system's. Raises ``DeviceError``.
        """
        self._files.sweep(time.time() if now is None else now)

    @property
    def used_bytes(self) -> int:
        """Of all files, complete or not."""
        return self._files.used_bytes

    # --- for peers --------------------------------------------------------------------

    def holds(self, digests: Iterable[str]) -> list[bool]:
        """See ``sources.TensorServer``."""
        known = self._files.tensors()
        return [digest in known for digest in digests]

    def read(self, digest: str, offset: int, length: int) -> bytes | None:
        """See ``sources.TensorServer``."""
        for extent, nbytes in self._files.extents(digest):
            data = read_extent(extent, nbytes, offset, length)
            if data is not None:
                return data
        return None

    # --- for stages -------------------------------------------------------------------

    def find(self, manifest: ShardManifest) -> HeldFile | None:
        """The complete file of a manifest, every byte of it verified now; None if there is none.

        A damaged file goes back among the unfinished ones, where its good pieces count. Waits
        while another thread assembles the same file. Raises ``DeviceError``.
        """
        file_lock = self._take(manifest.digest, None)
        try:
            return self._find(manifest, PieceTable(manifest), None)
        finally:
            file_lock.release()

    def assemble(
        self,
        manifest: ShardManifest,
        models: Sequence[Model] = (),
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Assembly:
        """The file of ``manifest``, as far as this disk has it; ``missing`` is to be fetched.

        ``models`` are whole models on this disk, whose tensors count as far as they are the same.
        Waits while another thread assembles the same file. ``progress`` is told the bytes that
        are had, ``cancel`` may be set to end the work. Raises ``DeviceError`` (no room, a disk
        that refuses, given up) and ``ModelFileError`` for a manifest that is no GGUF's.
        """
        digest = manifest.digest
        file_lock = self._take(digest, cancel)
        self._files.begin_work(digest)

        def on_close() -> None:
            self._files.end_work(digest)
            file_lock.release()

        try:
            pieces = PieceTable(manifest)
            file = self._find(manifest, pieces, cancel) or self._open_partial(manifest, pieces)
        except BaseException:
            on_close()
            raise
        assembly = Assembly(manifest, file, pieces, self._publish, on_close)
        try:
            sources: list[LocalTensors] = [
                self._files,
                *map(ModelTensors, models),
                self._files.unfinished(besides=digest),
            ]
            assembly.begin(sources, progress, cancel)
        except BaseException:
            assembly.close()
            raise
        return assembly

    def _take(self, digest: str, cancel: threading.Event | None) -> threading.Lock:
        with self._lock:
            file_lock = self._file_locks.setdefault(digest, threading.Lock())
        while not file_lock.acquire(timeout=_LOCK_POLL_S):
            check_cancelled(cancel)
        return file_lock

    def _find(
        self, manifest: ShardManifest, pieces: PieceTable, cancel: threading.Event | None
    ) -> HeldFile | None:
        held = self._hold(manifest)  # nobody removes it while it is read
        try:
            if not held.path.exists():
                held.release()
                return None
            with (
                disk_errors("a file of the cache cannot be read", self._files.folder),
                reading(held.path) as descriptor,
            ):
                whole = frame_is_good(descriptor, manifest)
                good = pieces.good_pieces(descriptor, range(len(pieces.pieces)), cancel)
        except BaseException:
            held.release()
            raise
        if not whole or len(good) < len(pieces.pieces):
            held.release()
            with disk_errors("a damaged file cannot be set aside", self._files.folder):
                self._files.set_aside(manifest.digest, sorted(good))
            return None
        self._files.note(manifest)
        return held

    def _hold(self, manifest: ShardManifest) -> HeldFile:
        digest = manifest.digest
        self._files.hold(digest)
        path = self._files.path(digest)
        return HeldFile(path, manifest.file_bytes, lambda: self._files.unhold(digest))

    def _open_partial(self, manifest: ShardManifest, pieces: PieceTable) -> PartialFile:
        what = "a part of the model cannot be put on this disk"
        with disk_errors(what, self._files.folder), self._room:
            self._files.make_folders()
            self._files.make_room(manifest)
            while True:
                try:
                    return PartialFile(self._files.partials, manifest, pieces)
                except OSError as error:
                    if error.errno not in _FULL or not self._files.drop_oldest(manifest):
                        raise

    def _publish(self, partial: PartialFile, manifest: ShardManifest) -> HeldFile:
        self._files.publish(partial.path, manifest)
        partial.forget_journal()
        held = self._hold(manifest)
        self._files.unhold(manifest.digest)  # ``publish`` held it as well
        return held
