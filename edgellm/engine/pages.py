"""KV pages: how the memory of one sequence is cut into pages and put together again. Pure.

No native code here. An engine gives the memory of a sequence as one blob: headers, and behind each
the cells of one tensor. Only the cells travel. The stage that takes them writes every header
itself, from the layout of its *own* context, so that nothing a peer sent is ever parsed by native
code: a page has one right length, and what is in it are numbers.

A page holds the cells of up to 64 consecutive positions, of all tensors one after the other:
for each cache, for each tensor, the cells in order of their positions (for a tensor that lies
transposed, row by row). What has no cells (recurrent states) follows in pages of kind ``state``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import StageError
from edgellm.wire.frames import Buffer
from edgellm.wire.tags_care import MAX_PAGE_BYTES, PAGE_CELLS

Bytes = NDArray[np.uint8]

STATE_PART_BYTES = 1 << 20
_CHECKED_AT_ONCE = 1 << 20

FLOATS: Mapping[int, tuple[str, int, int, int]] = MappingProxyType(
    {
        0: ("<u4", 0x7F800000, 1, 1),  # f32
        1: ("<u2", 0x7C00, 1, 1),  # f16
        2: ("<u2", 0x7C00, 9, 1),  # q4_0: 18 bytes, of which the first two are a scale
        3: ("<u2", 0x7C00, 10, 2),  # q4_1
        6: ("<u2", 0x7C00, 11, 1),  # q5_0
        7: ("<u2", 0x7C00, 12, 2),  # q5_1
        8: ("<u2", 0x7C00, 17, 1),  # q8_0
        20: ("<u2", 0x7C00, 9, 1),  # iq4_nl
        30: ("<u2", 0x7F80, 1, 1),  # bf16
    }
)
"""By ggml type: words of which size a block is made of; the bits of a float that are all set in one
that is no finite number; words in a block, and how many of them, at its beginning, are floats."""
NO_TYPE = -1


@dataclass(frozen=True, slots=True)
class Tensor:
    """The cells of one tensor in a blob."""

    header: bytes
    """What the engine writes before them."""
    cell_bytes: int
    kind: int = NO_TYPE
    """A key of ``FLOATS``, or ``NO_TYPE`` where anything goes."""
    columns: int = 0
    """Values of a cell, where they lie transposed; 0 where the bytes of a cell lie together."""


@dataclass(frozen=True, slots=True)
class Cache:
    """One attention cache. Layers with a sliding window have a second one."""

    streams: int
    """Sequences that the context keeps apart; 1 for a shared cache."""
    window: int
    """Only the last so many positions are kept; 0 keeps all."""
    two_dimensional: bool
    """Whether each cell also has the coordinates of M-RoPE: for text, its position twice."""
    head: bytes
    tensors: tuple[Tensor, ...]

    def kept(self, tokens: int) -> int:
        return min(tokens, self.window) if self.window else tokens

    @property
    def cell_bytes(self) -> int:
        return sum(tensor.cell_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The states of recurrent layers: of one size, however long the sequence is."""

    head: bytes
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a context lays out the memory of a sequence of any length."""

    caches: tuple[Cache, ...]
    recurrent: Recurrent | None = None

    @property
    def cell_bytes(self) -> int:
        return sum(cache.cell_bytes for cache in self.caches)


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a sequence's memory a page is. Both sides reckon it from layout and length."""

    index: int
    pages: int
    kind: str
    """``cells`` or ``state``."""
    position: int
    count: int
    """Cells; 0 for a part of a state."""
    offset: int
    """In the state; 0 for cells."""
    nbytes: int


class Image:
    """The memory of one sequence as one blob, of which pages are parts.

    Made of what an engine gave, or blank but for its headers, to be filled.
    """

    def __init__(
        self,
        layout: Layout,
        tokens: int,
        data: Bytes,
        cells: Sequence[Sequence[int]],
        states: Sequence[int],
        orders: Sequence[NDArray[np.intp] | None],
    ) -> None:
        """``cells`` and ``states``: offsets in ``data``, by cache and tensor. ``orders``: for each
        cache, where it does not lie in order of positions, the cell of each position."""
        self.layout = layout
        self.tokens = tokens
        self.data = data
        self._cells = cells
        self._states = states
        self._orders = orders
        self.pages = plan_pages(layout, tokens)

    def read(self, page: Page) -> bytes:
        """The payload of a page, ``page.nbytes`` long."""
        return b"".join(part.tobytes() for part in self._parts(page))

    def write(self, page: Page, payload: Buffer) -> None:
        """Put a page in its place in a blank image. Raises StageError for another length."""
        if any(order is not None for order in self._orders):  # parts of those are copies
            raise StageError("KV pages can be written to a blank image only.")
        if len(payload) != page.nbytes:
            raise StageError(
                f"KV page {page.index} has {len(payload)} bytes, {page.nbytes} are right."
            )
        source = np.frombuffer(payload, np.uint8)
        at = 0
        for part in self._parts(page):
            part[...] = source[at : at + part.size].reshape(part.shape)
            at += part.size

    def check(self) -> None:
        """To be called when all pages are there. Raises StageError for numbers that are not finite:
        they would not stay in their sequence, since attention multiplies masked cells too, and
        cells that are free again.
        """
        for cache, offsets in zip(self.layout.caches, self._cells, strict=True):
            kept = cache.kept(self.tokens)
            for tensor, at in zip(cache.tensors, offsets, strict=True):
                _check_finite(self.data[at : at + kept * tensor.cell_bytes], tensor.kind)
        if self.layout.recurrent is not None:
            for tensor, at in zip(self.layout.recurrent.tensors, self._states, strict=True):
                _check_finite(self.data[at : at + tensor.cell_bytes], tensor.kind)

    def cells(self, cache: int, tensor: int) -> Bytes:
        """All cells of a tensor that is not transposed: uint8 [cells, bytes of a cell]."""
        kept = self.layout.caches[cache].kept(self.tokens)
        size = self.layout.caches[cache].tensors[tensor].cell_bytes
        at = self._cells[cache][tensor]
        return self.data[at : at + kept * size].reshape(kept, size)

    def _parts(self, page: Page) -> Iterator[Bytes]:
        """Views of the blob, in the order of the page's bytes (copies where cells lie mixed)."""
        if page.kind == "state":
            yield from self._state_parts(page)
            return
        for cache, offsets, order in zip(
            self.layout.caches, self._cells, self._orders, strict=True
        ):
            kept = cache.kept(self.tokens)
            oldest = self.tokens - kept
            begin = max(page.position, oldest) - oldest
            end = page.position + page.count - oldest
            if end <= begin:
                continue
            where: Any = slice(begin, end) if order is None else order[begin:end]
            for tensor, at in zip(cache.tensors, offsets, strict=True):
                whole = self.data[at : at + kept * tensor.cell_bytes]
                if tensor.columns:
                    value = tensor.cell_bytes // tensor.columns
                    yield whole.reshape(tensor.columns, kept, value)[:, where]
                else:
                    yield whole.reshape(kept, tensor.cell_bytes)[where]

    def _state_parts(self, page: Page) -> Iterator[Bytes]:
        if self.layout.recurrent is None:
            return
        begin, end = page.offset, page.offset + page.nbytes
        before = 0
        for tensor, at in zip(self.layout.recurrent.tensors, self._states, strict=True):
            low, high = max(begin - before, 0), min(end - before, tensor.cell_bytes)
            if low < high:
                yield self.data[at + low : at + high]
            before += tensor.cell_bytes


def _check_finite(data: Bytes, kind: int) -> None:
    if kind == NO_TYPE:
        return
    word, bits, block, floats = FLOATS[kind]
    step = block * np.dtype(word).itemsize
    step *= max(1, _CHECKED_AT_ONCE // step)
    for begin in range(0, len(data), step):
        found = data[begin : begin + step].view(word).reshape(-1, block)[:, :floats] & bits
        if (found == bits).any():
            raise StageError("KV pages with numbers that are not finite.")


def plan_pages(layout: Layout, tokens: int) -> tuple[Page, ...]:
    """The pages of a sequence of ``tokens``, in the order in which they travel.

    Raises StageError where a single cell is too large for a page.
    """
    found: list[tuple[str, int, int, int, int]] = []
    if layout.caches:
        count = PAGE_CELLS
        while count > 1 and count * layout.cell_bytes > MAX_PAGE_BYTES:
            count //= 2
        if count * layout.cell_bytes > MAX_PAGE_BYTES:
            raise StageError(f"KV cells of {layout.cell_bytes} bytes do not fit a page.")
        for position in range(0, tokens, count):
            end = min(position + count, tokens)
            nbytes = 0
            for cache in layout.caches:
                oldest = tokens - cache.kept(tokens)
                nbytes += max(0, end - max(position, oldest)) * cache.cell_bytes
            if nbytes:  # none where all layers have a window, and it does not reach back so far
                found.append(("cells", position, end - position, 0, nbytes))
    if layout.recurrent is not None:
        size = sum(tensor.cell_bytes for tensor in layout.recurrent.tensors)
        for offset in range(0, size, STATE_PART_BYTES):
            part = min(STATE_PART_BYTES, size - offset)
            found.append(("state", tokens, 0, offset, part))
    return tuple(Page(index, len(found), *rest) for index, rest in enumerate(found))


def check_page(page: Page, *, kind: str, position: int, count: int, pages: int) -> None:
    """Raises StageError when what a peer says of a page is not what that page must be."""
    if (kind, position, count, pages) != (page.kind, page.position, page.count, page.pages):
        raise StageError(
            f"KV page {page.index} is {count} {kind} at {position} of {pages} pages;"
            f" {page.count} {page.kind} at {page.position} of {page.pages} were expected."
        )
