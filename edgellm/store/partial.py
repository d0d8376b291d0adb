"""A file in the making: its bytes, a journal of the pieces in it, and a note of its layout.

Blocking; one thread at a time. The journal (numbers of pieces, 32 bits each, little endian) is
only a hint where to look after a crash: every piece that it names is verified before it counts.
Neither it nor the note need be on the disk in time: what is lost of them is looked for elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from edgellm.errors import ModelFileError
from edgellm.modelfile.gguf import read_header
from edgellm.modelfile.manifest import ShardManifest
from edgellm.modelfile.metadata import meta_integer
from edgellm.store.disk import open_for_writing, reserve, write_at
from edgellm.store.layout import layout_of
from edgellm.store.sources import name_in_model
from edgellm.store.verify import PieceTable, write_frame

SUFFIX = ".part"
JOURNAL_SUFFIX = ".journal"
NOTE_SUFFIX = ".json"
MAX_JOURNAL_BYTES = 64 << 20

_NUMBER = struct.Struct("<I")


def remove_partial(folder: Path, digest: str) -> None:
    """Remove all files of a partial; those that are not there, or cannot be removed, stay."""
    for suffix in (SUFFIX, JOURNAL_SUFFIX, NOTE_SUFFIX):
        with contextlib.suppress(OSError):
            (folder / f"{digest}{suffix}").unlink()


class PartialFile:
    """The file of ``manifest`` in ``folder``, while it is not complete.

    Making one opens or creates it at its full size, with its frame. Raises ``OSError`` where the
    disk refuses (what was there before stays), ``ModelFileError`` where the manifest's header is
    not that of a GGUF with the manifest's tensors.
    """

    def __init__(self, folder: Path, manifest: ShardManifest, pieces: PieceTable) -> None:
        self._folder = folder
        self._manifest = manifest
        self._pieces = pieces
        stem = manifest.digest
        self.path = folder / f"{stem}{SUFFIX}"
        self._journal_path = folder / f"{stem}{JOURNAL_SUFFIX}"
        resumes = self.path.exists()
        self._file: int | None = open_for_writing(self.path)
        self._journal: int | None = None
        try:
            reserve(self._file, manifest.file_bytes)
            write_frame(self._file, manifest)
            self.names = _names(self.path, manifest)
            self._journal = open_for_writing(self._journal_path)
            os.lseek(self._journal, 0, os.SEEK_END)
            (folder / f"{stem}{NOTE_SUFFIX}").write_bytes(layout_of(manifest).to_json())
        except BaseException as error:
            self.close()
            if isinstance(error, ModelFileError) or not resumes:
                remove_partial(folder, stem)
            raise

    names: dict[str, str]
    """What each tensor is called in the whole model, by digest."""

    def resume(
        self, cancel: threading.Event | None, tell: Callable[[int], None] | None
    ) -> set[int]:
        """The numbers of the pieces that an earlier process left here, verified."""
        told = self._journal_path.read_bytes()[:MAX_JOURNAL_BYTES]
        whole = len(told) // _NUMBER.size * _NUMBER.size
        if whole != len(told) and self._journal is not None:
            os.ftruncate(self._journal, whole)  # the end of a torn write
            os.lseek(self._journal, 0, os.SEEK_END)
        numbers = {number for (number,) in _NUMBER.iter_unpack(told[:whole])}
        known = sorted(number for number in numbers if number < len(self._pieces.pieces))
        return self._pieces.good_pieces(self._descriptor, known, cancel, tell)

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write a verified piece to all its places, then name it in the journal."""
        for offset in self._pieces.offsets(number):
            write_at(self._descriptor, data, offset)
        if self._journal is not None:
            os.write(self._journal, _NUMBER.pack(number))

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise OSError("the file is closed")
        return self._file

    def sync(self) -> None:
        """Make the file's bytes durable."""
        os.fsync(self._descriptor)

    def forget_journal(self) -> None:
        """The file has left under its own name: remove what belonged to its making."""
        self.close()
        remove_partial(self._folder, self._manifest.digest)

    def close(self) -> None:
        """Close it; what is written stays for a resume. Harmless when repeated."""
        for descriptor in (self._file, self._journal):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._journal = None


def write_journal(folder: Path, digest: str, numbers: Iterable[int]) -> None:
    """The journal of a file that was complete and is damaged: these pieces of it are good."""
    data = b"".join(_NUMBER.pack(number) for number in numbers)
    (folder / f"{digest}{JOURNAL_SUFFIX}").write_bytes(data)


def _names(path: Path, manifest: ShardManifest) -> dict[str, str]:
    header = read_header(path)
    told = [(tensor.offset, tensor.nbytes) for tensor in header.tensors]
    parts = [part.nbytes for part in manifest.parts]
    if told != list(zip(manifest.offsets, parts, strict=True)):
        raise ModelFileError("a manifest's header has other tensors than its parts.", field="parts")
    first = meta_integer(header.metadata, "edgellm.shard.first") or 0
    names: dict[str, str] = {}
    for tensor, part in zip(header.tensors, manifest.parts, strict=True):
        if part.tensor is not None:
            names.setdefault(part.tensor.digest, name_in_model(tensor.name, first))
    return names
