"""A file compared with its manifest, and what of it is not tensor data written.

Blocking. A file consists of its *frame* (header, padding, parts of a repeated pattern) and of the
pieces of its tensors. Numbers of pieces count each tensor once, in the order of the file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from edgellm.modelfile.manifest import ShardManifest
from edgellm.modelfile.writer import padding
from edgellm.scheduler.transfer import Piece
from edgellm.store.disk import check_cancelled, in_threads, read_at, write_at

_FILL_REPEATS = 1 << 16
_BLOCK_PIECES = 16


class PieceTable:
    """The pieces of a manifest, numbered, and where each of them lies in the file."""

    def __init__(self, manifest: ShardManifest) -> None:
        self.tensors = manifest.tensors
        self._places: dict[str, list[int]] = {digest: [] for digest in self.tensors}
        for part, offset in zip(manifest.parts, manifest.offsets, strict=True):
            if part.tensor is not None:
                self._places[part.tensor.digest].append(offset)
        pieces: list[Piece] = []
        self._first: dict[str, int] = {}
        for digest, tensor in self.tensors.items():
            self._first[digest] = len(pieces)
            pieces += [Piece(digest, i, *tensor.piece(i)) for i in range(tensor.count)]
        self.pieces = tuple(pieces)

    def of_tensor(self, digest: str) -> range:
        """The numbers of a tensor's pieces."""
        first = self._first[digest]
        return range(first, first + self.tensors[digest].count)

    def number(self, piece: Piece) -> int | None:
        """The number of a piece; None for one that this manifest does not have."""
        first = self._first.get(piece.digest)
        if first is None or not 0 <= piece.index < self.tensors[piece.digest].count:
            return None
        number = first + piece.index
        return number if self.pieces[number] == piece else None

    def matches(self, number: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether ``data`` are the bytes of piece ``number``."""
        piece = self.pieces[number]
        return self.tensors[piece.digest].matches(piece.index, data)

    def offsets(self, number: int) -> list[int]:
        """Where in the file piece ``number`` lies: once for each part that holds its tensor."""
        piece = self.pieces[number]
        return [begin + piece.offset for begin in self._places[piece.digest]]

    def good_pieces(
        self,
        descriptor: int,
        numbers: Iterable[int],
        cancel: threading.Event | None = None,
        tell: Callable[[int], None] | None = None,
    ) -> set[int]:
        """Those of the pieces that are in the file with the right bytes, at all their places.

        ``tell`` is called with the bytes of each piece that was looked at. A piece that cannot
        be read is not good.
        """

        def look(block: tuple[int, ...]) -> list[int]:
            check_cancelled(cancel)
            good = []
            for number in block:
                if self._is_good(descriptor, number):
                    good.append(number)
                if tell is not None:
                    tell(self.pieces[number].length)
            return good

        blocks = list(_blocks(iter(numbers)))
        return {number for good in in_threads(look, blocks) for number in good}

    def _is_good(self, descriptor: int, number: int) -> bool:
        length = self.pieces[number].length
        try:
            return all(
                self.matches(number, read_at(descriptor, length, offset))
                for offset in self.offsets(number)
            )
        except OSError:
            return False


def _blocks(numbers: Iterator[int]) -> Iterator[tuple[int, ...]]:
    while block := tuple(islice(numbers, _BLOCK_PIECES)):
        yield block


def frame_is_good(descriptor: int, manifest: ShardManifest) -> bool:
    """Whether everything but the tensors' pieces is as the manifest says, the size too."""
    try:
        if os.fstat(descriptor).st_size != manifest.file_bytes:
            return False
        return all(
            read_at(descriptor, len(data), offset) == data for offset, data in _frame(manifest)
        )
    except OSError:
        return False


def write_frame(descriptor: int, manifest: ShardManifest) -> None:
    """Write everything but the tensors' pieces, where it is not there already."""
    for offset, data in _frame(manifest):
        if read_at(descriptor, len(data), offset) != data:
            write_at(descriptor, data, offset)


def _frame(manifest: ShardManifest) -> Iterator[tuple[int, bytes]]:
    """``(offset, bytes)`` of the frame, in blocks of bounded size."""
    yield 0, manifest.header
    for part, offset in zip(manifest.parts, manifest.offsets, strict=True):
        if part.tensor is None:
            block = part.pattern * _FILL_REPEATS
            for begin in range(0, part.nbytes, len(block)):
                yield offset + begin, block[: part.nbytes - begin]
        gap = padding(part.nbytes)
        if gap:
            yield offset + part.nbytes, bytes(gap)
