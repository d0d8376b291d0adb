"""Which tensor lies where in a file of the cache: from its manifest, and in the note beside it.

This file may import manifests. The note (JSON) is only a hint for finding tensors again without
the manifest; it is validated when it is read, and what is found by it is checked by its hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgellm.modelfile.gguf import MAX_TENSORS
from edgellm.modelfile.manifest import MAX_FILE_BYTES, ShardManifest
from edgellm.store.disk import is_digest

FORMAT = 1
MAX_NOTE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes ``offset`` to ``offset + nbytes`` of a file."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The tensors of one file, by digest; of equal ones the first."""

    file_bytes: int
    tensors: Mapping[str, Place]

    def to_json(self) -> bytes:
        """The note, for ``read_note``."""
        tensors = {name: [place.offset, place.nbytes] for name, place in self.tensors.items()}
        told = {"format": FORMAT, "file_bytes": self.file_bytes, "tensors": tensors}
        return json.dumps(told).encode()


def layout_of(manifest: ShardManifest) -> FileLayout:
    """The layout of the file that a manifest describes."""
    tensors: dict[str, Place] = {}
    for part, offset in zip(manifest.parts, manifest.offsets, strict=True):
        if part.tensor is not None:
            tensors.setdefault(part.tensor.digest, Place(offset, part.nbytes))
    return FileLayout(manifest.file_bytes, tensors)


def read_note(path: Path) -> FileLayout | None:
    """The layout that a note tells; None if there is none, or it is not a valid one."""
    try:
        if path.stat().st_size > MAX_NOTE_BYTES:
            return None
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        return None
    size, tensors = told.get("file_bytes"), told.get("tensors")
    if type(size) is not int or not 0 < size <= MAX_FILE_BYTES:
        return None
    if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS:
        return None
    found = {}
    for name, place in tensors.items():
        if not is_digest(name) or not isinstance(place, list) or len(place) != 2:
            return None
        offset, nbytes = place
        if type(offset) is not int or type(nbytes) is not int:
            return None
        if offset < 0 or nbytes <= 0 or offset + nbytes > size:
            return None
        found[name] = Place(offset, nbytes)
    return FileLayout(size, found)
