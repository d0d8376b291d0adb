"""The blob that llama.cpp writes for the state of one sequence, read and written. Pure.

No native code here; the format is that of ``llama_state_seq_get_data`` in the version that edgellm
asks for: ``llama_kv_cache::state_write``, the same once more for layers with a sliding window, and
``llama_memory_recurrent::state_write``. Whatever differs by a byte is refused: a llama.cpp with
another format, or a model with another kind of memory, then has no pages, and no wrong ones.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.engine.pages import FLOATS, Bytes, Cache, Image, Layout, Recurrent, Tensor
from edgellm.errors import StageError

MAX_LAYERS = 4096
_MAGIC = struct.pack("<I", 0xAF143CD8)
_UINT = struct.Struct("<I")
_HEAD = struct.Struct("<II")  # transposed, layers
_ROWS = struct.Struct("<iQ")  # type, bytes of a cell
_COLUMNS = struct.Struct("<iII")  # type, bytes of a value, values of a cell
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
_CELL_2D = np.dtype(
    [
        (name, "<u4" if name == "sequences" else "<i4")
        for name in ("position", "sequences", "x", "y", "token", "sequence")
    ]
)
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of memory a model has; the rest of the layout is read from a blob."""

    caches: int
    recurrent: bool
    streams: int
    window: int
    """Of the second cache."""
    two_dimensional: bool = False
    values: bool = True
    """Whether caches have values beside keys (latent attention has none)."""


class _Layouts:
    """Reads a blob of one shape strictly; ``StageError`` at the first byte that does not fit."""

    def __init__(self, data: Bytes, shape: Shape, tokens: int) -> None:
        self._data = data
        self._shape = shape
        self._tokens = tokens
        self._at = 0

    def read(self) -> Image:
        shape = self._shape
        if self._take(4) != _MAGIC:
            raise StageError("the state of a sequence begins with another number.")
        self._take(4)  # the slot that it was read from
        caches: list[Cache] = []
        offsets: list[list[int]] = []
        orders: list[NDArray[np.intp] | None] = []
        for index in range(shape.caches):
            cache, places, order = self._cache(shape.window if index else 0)
            caches.append(cache)
            offsets.append(places)
            orders.append(order)
        recurrent, states = self._recurrent() if shape.recurrent else (None, [])
        if self._at != len(self._data):
            raise StageError(f"{len(self._data) - self._at} bytes too many.")
        layout = Layout(tuple(caches), recurrent)
        return Image(layout, self._tokens, self._data, offsets, states, orders)

    def _take(self, count: int) -> bytes:
        """The next bytes of a header."""
        return self._skip(count).tobytes()

    def _skip(self, count: int) -> Bytes:
        begin = self._at
        if count > len(self._data) - begin:
            raise StageError(f"{count} bytes wanted at {begin} of {len(self._data)}.")
        self._at = begin + count
        return self._data[begin : self._at]

    def _count(self) -> int:
        value: int = _UINT.unpack(self._take(4))[0]
        return value

    def _cache(self, window: int) -> tuple[Cache, list[int], NDArray[np.intp] | None]:
        shape = self._shape
        if self._count() != shape.streams:
            raise StageError("another number of streams.")
        found: tuple[Cache, list[int], NDArray[np.intp] | None] | None = None
        for _ in range(shape.streams):
            count = self._count()
            if not count:
                continue
            kept = min(self._tokens, window) if window else self._tokens
            if found is not None or count != kept:
                raise StageError(f"{count} cells for {self._tokens} tokens.")
            order = self._order(count)
            head = self._take(_HEAD.size)
            tensors, places = self._tensors(head, count)
            cache = Cache(shape.streams, window, shape.two_dimensional, head, tuple(tensors))
            found = cache, places, order
        if found is None:
            raise StageError("no cells.")
        return found

    def _order(self, count: int) -> NDArray[np.intp] | None:
        kind = _CELL_2D if self._shape.two_dimensional else _CELL
        cells = np.frombuffer(self._skip(count * kind.itemsize), kind)
        positions = cells["position"]
        wanted = np.arange(self._tokens - count, self._tokens, dtype=np.int32)
        order = None if np.array_equal(positions, wanted) else np.argsort(positions)
        if order is not None and not np.array_equal(positions[order], wanted):
            raise StageError("cells are missing.")
        if (cells["sequences"] != 1).any():
            raise StageError("cells of several sequences.")
        if self._shape.two_dimensional and not (
            np.array_equal(cells["x"], positions) and np.array_equal(cells["y"], positions)
        ):
            raise StageError("cells of something that is no text.")
        return order

    def _tensors(self, head: bytes, count: int) -> tuple[list[Tensor], list[int]]:
        transposed, layers = _HEAD.unpack(head)
        if transposed > 1 or layers > MAX_LAYERS:  # one of two caches may have no layer at all
            raise StageError(f"{layers} layers.")
        tensors: list[Tensor] = []
        places: list[int] = []
        for number in range(2 * layers if self._shape.values else layers):
            columns = bool(transposed) and number >= layers
            tensor = self._header_of_columns() if columns else self._header_of_rows()
            tensors.append(tensor)
            places.append(self._at)
            self._skip(count * tensor.cell_bytes)
        return tensors, places

    def _header_of_rows(self, least: int = 1) -> Tensor:
        header = self._take(_ROWS.size)
        kind, size = _ROWS.unpack(header)
        if not least <= size <= len(self._data) or not _whole_blocks(kind, size):
            raise StageError(f"cells of {size} bytes, type {kind}.")
        return Tensor(header, size, kind)

    def _header_of_columns(self) -> Tensor:
        header = self._take(_COLUMNS.size)
        kind, value, columns = _COLUMNS.unpack(header)
        size = value * columns
        if not 0 < size <= len(self._data) or not _whole_blocks(kind, value):
            raise StageError(f"cells of {columns} values of {value} bytes, type {kind}.")
        return Tensor(header, size, kind, columns)

    def _recurrent(self) -> tuple[Recurrent, list[int]]:
        told = (self._count(), self._count(), self._count())
        if told != (1, self._tokens - 1, 0):
            raise StageError(f"a recurrent state of {told}.")
        head = self._take(_HEAD.size)
        transposed, layers = _HEAD.unpack(head)
        if transposed or not 0 < layers <= MAX_LAYERS:
            raise StageError(f"recurrent states of {layers} layers.")
        tensors: list[Tensor] = []
        places: list[int] = []
        while self._at < len(self._data):  # llama.cpp leaves out layers without a state
            tensor = self._header_of_rows(least=0)  # some have one of the two states only
            tensors.append(tensor)
            places.append(self._at)
            self._skip(tensor.cell_bytes)
        if not 0 < len(tensors) <= 2 * layers:
            raise StageError(f"{len(tensors)} recurrent states.")
        return Recurrent(head, tuple(tensors)), places


def _whole_blocks(kind: int, size: int) -> bool:
    if kind not in FLOATS:
        return False
    word, _, block, _ = FLOATS[kind]
    return size % (block * np.dtype(word).itemsize) == 0


def read_image(data: Bytes, shapes: Sequence[Shape], tokens: int) -> Image:
    """What llama.cpp wrote for a sequence of ``tokens``: uint8 [bytes], in one of these shapes.

    Raises StageError when it has none of them: then the memory of this model cannot be moved.
    """
    reasons = []
    for shape in shapes:
        try:
            return _Layouts(data, shape, tokens).read()
        except StageError as error:
            reasons.append(error.message)
    raise StageError(
        "the KV memory of this model cannot be moved: its layout is not known"
        f" ({' / '.join(reasons)})."
    )


def blank_image(layout: Layout, tokens: int) -> Image:
    """A blob for ``tokens`` with all headers, to be filled page by page.

    Raises StageError when there is not enough memory.
    """
    literals: list[tuple[int, bytes]] = []
    cells: list[list[int]] = []
    at = 0

    def add(header: bytes, data: int = 0) -> int:
        nonlocal at
        literals.append((at, header))
        at += len(header)
        begin, at = at, at + data
        return begin

    add(_MAGIC + bytes(4))
    for cache in layout.caches:
        kept = cache.kept(tokens)
        add(_UINT.pack(cache.streams) + _UINT.pack(kept))
        add(_cell_headers(cache, tokens))
        add(cache.head)
        cells.append([add(t.header, kept * t.cell_bytes) for t in cache.tensors])
        add(bytes(4 * (cache.streams - 1)))  # the other streams hold nothing of it
    states: list[int] = []
    if layout.recurrent is not None:
        add(_UINT.pack(1) + _UINT.pack(tokens - 1) + _UINT.pack(0) + layout.recurrent.head)
        states = [add(t.header, t.cell_bytes) for t in layout.recurrent.tensors]
    try:
        data = np.empty(at, np.uint8)
    except MemoryError as error:
        raise StageError(f"no memory for {at} bytes of KV pages.") from error
    for begin, header in literals:
        data[begin : begin + len(header)] = np.frombuffer(header, np.uint8)
    return Image(layout, tokens, data, cells, states, [None] * len(cells))


def _cell_headers(cache: Cache, tokens: int) -> bytes:
    kept = cache.kept(tokens)
    made = np.zeros(kept, _CELL_2D if cache.two_dimensional else _CELL)
    made["position"] = np.arange(tokens - kept, tokens, dtype=np.int32)
    made["sequences"] = 1
    if cache.two_dimensional:
        made["x"] = made["y"] = made["position"]
        made["token"] = _NO_TOKEN
    return made.tobytes()
