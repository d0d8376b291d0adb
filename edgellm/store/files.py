"""The files of a cache: which there are, which of them are held, and which have to go for room.

Blocking but quick; safe for several threads; a folder belongs to one process. Whether a file's
bytes are right is not known here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import DeviceError, ModelFileError
from edgellm.modelfile.manifest import ShardManifest
from edgellm.modelfile.writer import sync_directory, write_atomically
from edgellm.store.disk import disk_errors, is_digest
from edgellm.store.layout import FileLayout, layout_of, read_note
from edgellm.store.partial import (
    JOURNAL_SUFFIX,
    NOTE_SUFFIX,
    SUFFIX,
    remove_partial,
    write_journal,
)
from edgellm.store.sources import Extent, Wanted

PARTIAL_KEPT_S = 7 * 24 * 3600
"""How long an unfinished file waits for somebody to go on with it."""
SHARD_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file, as far as removing it is concerned."""

    used_at: float
    digest: str
    complete: bool
    nbytes: int


class CacheFiles:
    """Complete files in ``shards``, unfinished ones in ``partial``, ``limit_bytes`` for both."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.partials = folder / "partial"
        self._shards = folder / "shards"
        self._limit = limit_bytes
        self._lock = threading.RLock()
        self._layouts: dict[str, FileLayout] = {}
        self._held: Counter[str] = Counter()
        """Complete files that may not go, by digest."""
        self._busy: Counter[str] = Counter()
        """Unfinished files that somebody works on."""

    def path(self, digest: str) -> Path:
        """Of a complete file; raises ``ModelFileError`` for what is no digest."""
        if not is_digest(digest):  # it becomes a path
            raise ModelFileError(f"{digest[:80]!r} is no digest.", field="digest")
        return self._shards / f"{digest}{SHARD_SUFFIX}"

    def _note(self, digest: str) -> Path:
        return self._shards / f"{digest}{NOTE_SUFFIX}"

    def make_folders(self) -> None:
        """Raises ``OSError``."""
        for folder in (self._shards, self.partials):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def sweep(self, now: float) -> None:
        """Learn what is there; remove what a crash left behind, and what is too old or too much.

        ``now``: seconds since 1970. Raises ``DeviceError``.
        """
        with disk_errors("the cache cannot be used", self.folder), self._lock:
            self.make_folders()
            for folder in (self._shards, self.partials):
                for path in folder.glob(".*"):
                    if path.is_file():
                        path.unlink(missing_ok=True)
            self._layouts = {}
            for digest in _digests_in(self._shards, SHARD_SUFFIX, NOTE_SUFFIX):
                self._learn(digest)
            for digest in _digests_in(self.partials, SUFFIX, JOURNAL_SUFFIX, NOTE_SUFFIX):
                path = self.partials / f"{digest}{SUFFIX}"
                if not path.exists() or now - path.stat().st_mtime > PARTIAL_KEPT_S:
                    remove_partial(self.partials, digest)
            self._evict(0, frozenset())

    def _learn(self, digest: str) -> None:
        layout = read_note(self._note(digest))
        path = self.path(digest)
        if layout is not None and path.exists() and path.stat().st_size == layout.file_bytes:
            self._layouts[digest] = layout
        else:  # the file itself may be good: it is looked at when its manifest is asked for
            self._note(digest).unlink(missing_ok=True)

    # --- tensors ----------------------------------------------------------------------

    def tensors(self) -> set[str]:
        """The digests of the tensors in complete files."""
        with self._lock:
            return {name for layout in self._layouts.values() for name in layout.tensors}

    def extents(self, tensor: str) -> list[tuple[Extent, int]]:
        """Where in complete files a tensor lies, and its size."""
        with self._lock:
            return [
                (Extent(self.path(digest), place.offset), place.nbytes)
                for digest, layout in self._layouts.items()
                if (place := layout.tensors.get(tensor)) is not None
            ]

    def candidates(self, wanted: Wanted) -> Iterator[Extent]:
        """See ``sources.LocalTensors``."""
        for extent, nbytes in self.extents(wanted.tensor.digest):
            if nbytes == wanted.tensor.nbytes:
                yield extent

    # --- complete files ---------------------------------------------------------------

    def hold(self, digest: str) -> None:
        """A complete file may not go, until ``unhold``."""
        with self._lock:
            self._held[digest] += 1

    def unhold(self, digest: str) -> None:
        with self._lock:
            self._held[digest] -= 1
            if not self._held[digest]:
                del self._held[digest]

    def note(self, manifest: ShardManifest) -> None:
        """Remember that the complete file of ``manifest`` is there, and was used now.

        A full disk is no reason to do without the file: the note is written again next time.
        """
        layout = layout_of(manifest)
        path = self._note(manifest.digest)
        with self._lock:
            known = self._layouts.get(manifest.digest) == layout
            self._layouts[manifest.digest] = layout
        with contextlib.suppress(OSError, DeviceError):
            if known and path.exists():
                os.utime(path)
            else:
                write_atomically(path, (layout.to_json(),), aside=self.partials)

    def publish(self, unfinished: Path, manifest: ShardManifest) -> None:
        """Move a complete, durable file to its place, and hold it for the caller."""
        with self._lock:
            path = self.path(manifest.digest)
            unfinished.replace(path)
            self.hold(manifest.digest)
        sync_directory(self._shards)
        self.note(manifest)
        with self._lock:
            self._evict(0, frozenset())

    def set_aside(self, digest: str, good: Sequence[int]) -> None:
        """Make a damaged file an unfinished one, of which the pieces ``good`` are there."""
        with self._lock:
            self._layouts.pop(digest, None)
            remove_partial(self.partials, digest)
            write_journal(self.partials, digest, good)
            self.path(digest).replace(self.partials / f"{digest}{SUFFIX}")
            self._note(digest).unlink(missing_ok=True)

    # --- unfinished files -------------------------------------------------------------

    def begin_work(self, digest: str) -> None:
        """Somebody works on an unfinished file, until ``end_work``."""
        with self._lock:
            self._busy[digest] += 1

    def end_work(self, digest: str) -> None:
        with self._lock:
            self._busy[digest] -= 1
            if not self._busy[digest]:
                del self._busy[digest]

    def unfinished(self, besides: str) -> Unfinished:
        """The tensors of the other unfinished files, as far as they are there."""
        found = {}
        for digest in _digests_in(self.partials, NOTE_SUFFIX):
            layout = read_note(self.partials / f"{digest}{NOTE_SUFFIX}")
            if layout is not None and digest != besides:
                found[self.partials / f"{digest}{SUFFIX}"] = layout
        return Unfinished(found)

    # --- room -------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Of all files, complete or not."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries())

    def make_room(self, manifest: ShardManifest) -> None:
        """Have files go until that of ``manifest`` fits below the limit.

        Those that have some of its tensors stay until it is complete, even beyond the limit.
        Raises ``DeviceError`` when it does not fit beside what is in use.
        """
        needed = manifest.file_bytes
        with self._lock:
            there = _stat(self.partials / f"{manifest.digest}{SUFFIX}")
            fixed = sum(
                entry.nbytes
                for entry in self._entries()
                if self._in_use(entry) and entry.digest != manifest.digest
            )
            if fixed + needed > self._limit:
                in_use = f", of which {_size(fixed)} are in use" if fixed else ""
                raise DeviceError(
                    f"a part of the model needs {_size(needed)} of disk; the cache may hold"
                    f" {_size(self._limit)}{in_use}.",
                    hint="Raise this device's cache limit, or end another model that runs on it.",
                )
            to_come = needed - (there.st_size if there is not None else 0)
            self._evict(to_come, self._related(manifest))

    def drop_oldest(self, manifest: ShardManifest) -> bool:
        """The disk itself is full: have one more file go. False if there is none that may."""
        with self._lock:
            return any(self._remove(entry) for entry in self._spare(self._related(manifest)))

    def _related(self, manifest: ShardManifest) -> frozenset[str]:
        """Files that the one of ``manifest`` can be put together from, and itself."""
        tensors = manifest.tensors.keys()
        unfinished = self.unfinished(manifest.digest).layouts
        layouts = {**self._layouts, **{path.stem: layout for path, layout in unfinished.items()}}
        found = {name for name, layout in layouts.items() if tensors & layout.tensors.keys()}
        return frozenset(found | {manifest.digest})

    def _evict(self, needed: int, keep: frozenset[str]) -> None:
        used = sum(entry.nbytes for entry in self._entries())
        for entry in self._spare(keep):
            if used + needed <= self._limit:
                break
            if self._remove(entry):
                used -= entry.nbytes

    def _spare(self, keep: frozenset[str]) -> list[_Entry]:
        """What may go, the least recently used first."""
        found = (e for e in self._entries() if e.digest not in keep and not self._in_use(e))
        return sorted(found, key=lambda entry: entry.used_at)

    def _in_use(self, entry: _Entry) -> bool:
        return entry.digest in (self._held if entry.complete else self._busy)

    def _remove(self, entry: _Entry) -> bool:
        """Whether it is gone; what the system does not let go stays."""
        if not entry.complete:
            remove_partial(self.partials, entry.digest)
            return not (self.partials / f"{entry.digest}{SUFFIX}").exists()
        try:
            self.path(entry.digest).unlink(missing_ok=True)
        except OSError:
            return False
        self._layouts.pop(entry.digest, None)
        with contextlib.suppress(OSError):
            self._note(entry.digest).unlink(missing_ok=True)
        return True

    def _entries(self) -> Iterator[_Entry]:
        for folder, suffix, complete in (
            (self._shards, SHARD_SUFFIX, True),
            (self.partials, SUFFIX, False),
        ):
            for digest in _digests_in(folder, suffix):
                status = _stat(folder / f"{digest}{suffix}")
                if status is None:
                    continue
                note = _stat(self._note(digest)) if complete else None
                used_at = (note or status).st_mtime
                yield _Entry(used_at, digest, complete, status.st_size)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Unfinished files as sources: what is not there yet does not pass for what is wanted."""

    layouts: dict[Path, FileLayout]

    def candidates(self, wanted: Wanted) -> Iterator[Extent]:
        """See ``sources.LocalTensors``."""
        for path, layout in self.layouts.items():
            place = layout.tensors.get(wanted.tensor.digest)
            if place is not None and place.nbytes == wanted.tensor.nbytes:
                yield Extent(path, place.offset)


def _digests_in(folder: Path, *suffixes: str) -> list[str]:
    try:
        names = sorted({path.stem for path in folder.iterdir() if path.suffix in suffixes})
    except FileNotFoundError:
        return []
    return [name for name in names if is_digest(name)]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _size(nbytes: int) -> str:
    gib = 1 << 30
    return f"{nbytes / gib:.1f} GiB" if nbytes >= gib else f"{nbytes / (1 << 20):.1f} MiB"
