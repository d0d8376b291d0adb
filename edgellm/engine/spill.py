"""KV of ended sequences on this device's disk, so that their slots are free for others.

Each sequence is a file without a name: it is gone with the process, however that ends. What comes
back is checked by its digest. No engine is called here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgellm.engine.pages import Page
from edgellm.errors import StageError

MOST_OF_FREE = 4
"""A quarter of what is free on the disk may be used, at most."""


@dataclass(frozen=True, slots=True)
class _Stored:
    file: IO[bytes]
    tokens: int
    nbytes: int
    digest: bytes


class SpillStore:
    """See the module. At most ``limit`` bytes, in ``folder`` or, where that cannot be written to,
    in the system's folder for temporary files."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._stored: dict[int, _Stored] = {}
        weakref.finalize(self, _close_all, self._stored)

    @property
    def nbytes(self) -> int:
        """Bytes on the disk now."""
        return sum(stored.nbytes for stored in self._stored.values())

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._stored

    def tokens(self, sequence: int) -> int:
        """How many tokens of a sequence are here; 0 where none are."""
        stored = self._stored.get(sequence)
        return 0 if stored is None else stored.tokens

    def put(self, sequence: int, tokens: int, pages: Iterable[bytes], nbytes: int) -> None:
        """Write the pages of a sequence, ``nbytes`` in all. Raises StageError where there is no
        room for it, or the disk fails."""
        self.drop(sequence)
        try:
            file = self._file(nbytes)
            digest = hashlib.sha256()
            for page in pages:
                digest.update(page)
                file.write(page)
            file.flush()
        except OSError as error:
            raise StageError(f"KV pages cannot be put on the disk: {error.strerror}.") from error
        self._stored[sequence] = _Stored(file, tokens, nbytes, digest.digest())

    def _file(self, nbytes: int) -> IO[bytes]:
        usual = tempfile.gettempdir()
        folder = usual if self._folder is None else str(self._folder)
        try:
            file = _unnamed(folder)
        except OSError:
            folder, file = usual, _unnamed(usual)
        room = min(self._limit - self.nbytes, shutil.disk_usage(folder).free // MOST_OF_FREE)
        if nbytes > room:
            file.close()
            raise StageError(f"no room on the disk for {nbytes} bytes of KV pages.")
        return file

    def read(self, sequence: int, pages: Iterable[Page]) -> Iterator[tuple[Page, bytes]]:
        """The pages of a sequence, in the order in which they were put. Raises StageError where
        they are not what was put: nothing of them may be used then."""
        stored = self._stored[sequence]
        digest = hashlib.sha256()
        try:
            stored.file.seek(0)
            for page in pages:
                data = stored.file.read(page.nbytes)
                digest.update(data)
                yield page, data
        except OSError as error:
            raise StageError(f"KV pages cannot be read again: {error.strerror}.") from error
        if digest.digest() != stored.digest:
            raise StageError("KV pages on the disk are not what was put there.")

    def drop(self, sequence: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        stored = self._stored.pop(sequence, None)
        if stored is not None:
            stored.file.close()


def _unnamed(folder: str) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


def _close_all(stored: Mapping[int, _Stored]) -> None:
    for each in stored.values():
        each.file.close()
