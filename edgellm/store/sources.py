"""Where a tensor's bytes may be had on this disk, and who hands them to peers.

Blocking. Nothing here is trusted: whoever copies from an ``Extent`` checks every piece by its hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgellm.modelfile.manifest import TensorDigest
from edgellm.modelfile.model import Model, layer_of
from edgellm.modelfile.recipe import EMBEDDING, HEAD
from edgellm.store.disk import read_at, reading

MAX_READ_BYTES = 1 << 20
"""Of one request by a peer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to be found: by its content, and by the name it has in the whole model."""

    tensor: TensorDigest
    name: str


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes are said to lie: from byte ``offset`` of a file on."""

    path: Path
    offset: int


class LocalTensors(Protocol):
    """Something on this disk that may hold tensors."""

    def candidates(self, wanted: Wanted) -> Iterator[Extent]:
        """Places where the tensor may lie, the likeliest first."""


class TensorServer(Protocol):
    """What answers peers that ask for tensors, or manifests, by their digests."""

    def holds(self, digests: Iterable[str]) -> list[bool]:
        """Which of these can be had here. Quick."""

    def read(self, digest: str, offset: int, length: int) -> bytes | None:
        """``length`` bytes of a tensor; None for a range that cannot be had here. Blocking.

        The bytes are as the disk gives them: whoever asked checks them.
        """


def read_extent(extent: Extent, nbytes: int, offset: int, length: int) -> bytes | None:
    """``length`` bytes of a tensor of ``nbytes`` at ``extent``, for a peer; None if impossible."""
    if offset < 0 or not 0 < length <= MAX_READ_BYTES or offset + length > nbytes:
        return None
    try:
        with reading(extent.path) as descriptor:
            data = read_at(descriptor, length, extent.offset + offset)
    except OSError:
        return None
    return data if len(data) == length else None


class ModelTensors:
    """A whole model's file as a source: for peers by the digests told, on this disk by names.

    ``digests``: of its tensors by name, as ``TensorDigests.of`` gives them; not needed to copy
    from the file, where pieces are compared with what is wanted anyway.
    """

    def __init__(self, model: Model, digests: Mapping[str, TensorDigest] | None = None) -> None:
        self._model = model
        self._names: dict[str, str] = {}
        self.add(digests or {})

    def add(self, digests: Mapping[str, TensorDigest]) -> None:
        """Tell the digests of further tensors."""
        names = {tensor.digest: name for name, tensor in digests.items()}
        self._names = self._names | names  # one assignment: readers are in other threads

    def holds(self, digests: Iterable[str]) -> list[bool]:
        """See ``TensorServer``."""
        return [digest in self._names for digest in digests]

    def read(self, digest: str, offset: int, length: int) -> bytes | None:
        """See ``TensorServer``."""
        name = self._names.get(digest)
        if name is None:
            return None
        source = self._model.tensor(name)
        extent = Extent(source.path, source.info.offset)
        return read_extent(extent, source.info.nbytes, offset, length)

    def candidates(self, wanted: Wanted) -> Iterator[Extent]:
        """See ``LocalTensors``. A tied head lies under the embedding's name."""
        names = (wanted.name, EMBEDDING) if wanted.name == HEAD else (wanted.name,)
        for name in names:
            source = self._model.tensors.get(name)
            if source is not None and source.info.nbytes == wanted.tensor.nbytes:
                yield Extent(source.path, source.info.offset)


def name_in_model(name: str, first_layer: int) -> str:
    """The whole model's name of a shard's tensor: layers are renumbered in a shard."""
    place = layer_of(name)
    return name if place is None else f"blk.{place[0] + first_layer}.{place[1]}"
