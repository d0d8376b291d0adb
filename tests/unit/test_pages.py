"""Pages as pure arithmetic: which there are, what is in them, and blobs that are read strictly."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from edgellm.engine.pages import (
    NO_TYPE,
    STATE_PART_BYTES,
    Cache,
    Image,
    Layout,
    Page,
    Recurrent,
    Tensor,
    check_page,
    plan_pages,
)
from edgellm.engine.stateblob import Shape, blank_image, read_image
from edgellm.errors import StageError
from edgellm.wire.tags_care import MAX_PAGE_BYTES

pytestmark = pytest.mark.pure

F16, Q8_0 = 1, 8
HEAD = struct.pack("<II", 0, 2)


def rows(size: int, kind: int = F16) -> Tensor:
    return Tensor(struct.pack("<iQ", kind, size), size, kind)


def columns(values: int) -> Tensor:
    return Tensor(struct.pack("<iII", F16, 2, values), 2 * values, F16, values)


def cache(*tensors: Tensor, streams: int = 1, window: int = 0, planar: bool = False) -> Cache:
    transposed = int(any(tensor.columns for tensor in tensors))
    head = struct.pack("<II", transposed, len(tensors) // 2)
    return Cache(streams, window, planar, head, tensors)


PLAIN = Layout((cache(rows(8), rows(12), rows(8), rows(12)),))
SPLIT = Layout((cache(rows(8), rows(8), streams=3),))
TRANSPOSED = Layout((cache(rows(8), columns(5)),))
PLANAR = Layout((cache(rows(8), rows(8), planar=True),))
WINDOWED = Layout((cache(rows(8), rows(8)), cache(rows(4), rows(4), window=10)))
ONLY_WINDOW = Layout((cache(), cache(rows(4), rows(4), window=10)))
STATES = Recurrent(HEAD, (rows(8, 0), rows(0, 0), rows(16, 0)))
HYBRID = Layout((cache(rows(8), rows(8)),), STATES)
RECURRENT = Layout((), STATES)
SHAPES = {
    "plain": (PLAIN, Shape(1, False, 1, 0)),
    "split": (SPLIT, Shape(1, False, 3, 0)),
    "transposed": (TRANSPOSED, Shape(1, False, 1, 0)),
    "planar": (PLANAR, Shape(1, False, 1, 0, two_dimensional=True)),
    "windowed": (WINDOWED, Shape(2, False, 1, 10)),
    "only-window": (ONLY_WINDOW, Shape(2, False, 1, 10)),
    "hybrid": (HYBRID, Shape(1, True, 1, 0)),
    "recurrent": (RECURRENT, Shape(0, True, 1, 0)),
}


def filled(layout: Layout, tokens: int) -> Image:
    """All bytes that pages carry are random, and finite as float16 and float32."""
    image = blank_image(layout, tokens)
    random = np.random.default_rng(tokens)
    for page in image.pages:
        image.write(page, random.integers(0, 0x60, page.nbytes, np.uint8).tobytes())
    return image


@pytest.mark.parametrize("tokens", [1, 9, 63, 64, 65, 200])
@pytest.mark.parametrize("name", SHAPES)
def test_a_blob_comes_back_from_its_pages(name: str, tokens: int) -> None:
    layout, shape = SHAPES[name]
    image = filled(layout, tokens)
    image.check()
    read = read_image(image.data, [shape], tokens)
    assert read.layout == layout
    other = blank_image(read.layout, tokens)
    for page, other_page in zip(read.pages, other.pages, strict=True):
        assert page == other_page
        other.write(other_page, read.read(page))
    assert other.data.tobytes() == image.data.tobytes()


@pytest.mark.parametrize("name", SHAPES)
def test_pages_hold_all_that_differs_and_nothing_twice(name: str) -> None:
    layout, _ = SHAPES[name]
    tokens = 200
    image = blank_image(layout, tokens)
    image.data[:] = 0
    for page in image.pages:
        image.write(page, b"\x01" * page.nbytes)
        assert int(image.data.sum()) == sum(each.nbytes for each in image.pages[: page.index + 1])


def test_pages_are_of_64_cells_in_order() -> None:
    pages = plan_pages(HYBRID, 150)
    assert [(page.kind, page.position, page.count) for page in pages] == [
        ("cells", 0, 64),
        ("cells", 64, 64),
        ("cells", 128, 22),
        ("state", 150, 0),
    ]
    assert [(page.index, page.pages) for page in pages] == [(i, 4) for i in range(4)]
    assert [page.nbytes for page in pages] == [64 * 16, 64 * 16, 22 * 16, 24]


def test_cells_that_are_behind_a_window_do_not_travel() -> None:
    full, half = 16, 8
    assert [page.nbytes for page in plan_pages(WINDOWED, 132)] == [
        64 * full,
        64 * full + 6 * half,
        4 * full + 4 * half,
    ]
    # and where there is nothing else, nor do pages without any
    pages = plan_pages(ONLY_WINDOW, 132)
    assert [(page.position, page.count, page.nbytes) for page in pages] == [
        (64, 64, 6 * half),
        (128, 4, 4 * half),
    ]
    assert [page.index for page in pages] == [0, 1]


def test_large_cells_make_pages_of_fewer() -> None:
    size = MAX_PAGE_BYTES // 20
    pages = plan_pages(Layout((cache(rows(size // 2 * 2)),)), 40)
    assert [page.count for page in pages] == [16, 16, 8]
    assert max(page.nbytes for page in pages) <= MAX_PAGE_BYTES
    with pytest.raises(StageError, match="do not fit a page"):
        plan_pages(Layout((cache(rows(MAX_PAGE_BYTES + 2)),)), 1)


def test_states_travel_in_parts() -> None:
    size = 2 * STATE_PART_BYTES + 8
    layout = Layout((), Recurrent(HEAD, (rows(size, 0), rows(16, 0))))
    pages = plan_pages(layout, 5)
    assert [page.nbytes for page in pages] == [STATE_PART_BYTES, STATE_PART_BYTES, 24]
    image = filled(layout, 5)
    again = blank_image(layout, 5)
    for page in pages:
        again.write(page, image.read(page))
    assert again.data.tobytes() == image.data.tobytes()


def test_cells_in_another_order_come_out_in_order() -> None:
    """As in a shared cache, where sequences grow in turns."""
    layout, shape = SHAPES["plain"]
    image = filled(layout, 100)
    order = np.random.default_rng(1).permutation(100)
    mixed = image.data.copy()
    begin = 8 + 8
    metas = image.data[begin : begin + 1200].reshape(100, 12)
    mixed[begin : begin + 1200] = metas[order].reshape(-1)
    for tensor in range(4):
        cells = image.cells(0, tensor)
        at = int(cells.ctypes.data - image.data.ctypes.data)
        mixed[at : at + cells.size] = cells[order].reshape(-1)
    read = read_image(mixed, [shape], 100)
    assert [read.read(page) for page in read.pages] == [image.read(page) for page in image.pages]
    with pytest.raises(StageError, match="to a blank image only"):
        read.write(read.pages[0], bytes(read.pages[0].nbytes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "state"}, "of 3 pages"),
        ({"position": 0}, "0 of 3 pages; 64 cells at 64"),
        ({"count": 63}, "63 cells at 64"),
        ({"pages": 4}, "of 4 pages"),
    ],
)
def test_what_is_said_of_a_page_must_be_so(change: dict[str, object], words: str) -> None:
    page = plan_pages(PLAIN, 150)[1]
    said = {"kind": "cells", "position": 64, "count": 64, "pages": 3}
    check_page(page, **said)  # type: ignore[arg-type]
    with pytest.raises(StageError, match=words):
        check_page(page, **{**said, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [-1, 1])
def test_a_page_of_another_length_is_refused(by: int) -> None:
    image = blank_image(PLAIN, 100)
    page = image.pages[1]
    before = image.data.tobytes()
    with pytest.raises(StageError, match=f"has {page.nbytes + by} bytes, {page.nbytes} are right"):
        image.write(page, bytes(page.nbytes + by))
    assert image.data.tobytes() == before


# --- numbers that are not finite ------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "block", "wrong"),
    [
        (0, bytes(4), struct.pack("<f", float("nan"))),
        (0, bytes(4), struct.pack("<f", float("-inf"))),
        (1, bytes(2), struct.pack("<e", float("inf"))),
        (30, bytes(2), b"\x80\x7f"),
        (2, bytes(18), struct.pack("<e", float("nan")) + bytes(16)),
        (3, bytes(20), bytes(2) + struct.pack("<e", float("inf")) + bytes(16)),
        (6, bytes(22), struct.pack("<e", float("nan")) + bytes(20)),
        (7, bytes(24), bytes(2) + struct.pack("<e", float("nan")) + bytes(20)),
        (8, bytes(34), struct.pack("<e", float("nan")) + bytes(32)),
        (20, bytes(18), struct.pack("<e", float("nan")) + bytes(16)),
    ],
)
def test_infinite_numbers_are_found_wherever_they_are(
    kind: int, block: bytes, wrong: bytes
) -> None:
    blocks = 5
    layout = Layout((cache(rows(blocks * len(block), kind)),))
    for at in (0, 7, 70 * blocks - 1):
        image = blank_image(layout, 70)
        image.cells(0, 0)[:] = 0
        image.check()
        cells = image.cells(0, 0).reshape(-1, len(block))
        cells[at] = np.frombuffer(wrong, np.uint8)
        with pytest.raises(StageError, match="not finite"):
            image.check()
    if kind in (2, 3, 6, 7, 8, 20):  # whole numbers behind the scales may be anything
        image.cells(0, 0)[:] = 0
        cells[:, 8:] = 0xFF
        image.check()


def test_infinite_numbers_in_a_state_are_found() -> None:
    image = filled(RECURRENT, 3)
    image.check()
    image.data[-4:] = np.frombuffer(struct.pack("<f", float("nan")), np.uint8)
    with pytest.raises(StageError, match="not finite"):
        image.check()


def test_where_anything_goes_nothing_is_looked_at() -> None:
    layout = Layout((Cache(1, 0, False, b"", (Tensor(b"", 3, NO_TYPE),)),))
    image = Image(layout, 4, np.full(12, 0xFF, np.uint8), [[0]], [], [None])
    image.check()


# --- blobs that are not what they should be -------------------------------------------


def refused(data: np.ndarray, shapes: Sequence[Shape], tokens: int) -> str:
    with pytest.raises(StageError, match="cannot be moved") as caught:
        read_image(np.ascontiguousarray(data), shapes, tokens)
    return caught.value.message


@pytest.mark.parametrize("name", SHAPES)
def test_a_blob_of_any_other_length_is_refused(name: str) -> None:
    layout, shape = SHAPES[name]
    data = filled(layout, 70).data
    for cut in range(0, len(data), 7):
        refused(data[:cut], [shape], 70)
    refused(np.concatenate([data, np.zeros(1, np.uint8)]), [shape], 70)


@pytest.mark.parametrize("name", SHAPES)
def test_a_blob_of_another_number_of_tokens_is_refused(name: str) -> None:
    layout, shape = SHAPES[name]
    data = filled(layout, 70).data
    for tokens in (1, 69, 71):
        refused(data, [shape], tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_a_blob_of_another_shape_is_refused(name: str) -> None:
    layout, shape = SHAPES[name]
    data = filled(layout, 70).data
    others = [each for other, (_, each) in SHAPES.items() if each != shape]
    refused(data, others, 70)
    assert read_image(data, [*others, shape], 70).layout == layout


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"\x00", "begins with another number"),
        (8, b"\x02", "another number of streams"),
        (12, b"\x45", "69 cells for 70 tokens"),
        (16, b"\x05", "cells are missing"),
        (20, b"\x02", "cells of several sequences"),
        (16 + 840 + 1, b"\xff", "layers"),
        (16 + 840 + 8, b"\x63", "type 99"),
        (16 + 840 + 12, b"\x00", "cells of 0 bytes"),
        (16 + 840 + 18, b"\xff", "cells of"),
    ],
)
def test_each_header_is_looked_at(at: int, value: bytes, words: str) -> None:
    layout, shape = SHAPES["plain"]
    data = filled(layout, 70).data
    data[at : at + 1] = np.frombuffer(value, np.uint8)
    assert words in refused(data, [shape], 70)


def test_the_wrong_slot_number_is_nobody_s_business() -> None:
    """The blob names the slot that it was read from; it is restored into another one."""
    layout, shape = SHAPES["plain"]
    image = filled(layout, 70)
    image.data[4] = 7
    assert read_image(image.data, [shape], 70).layout == layout


def test_pages_compare_by_what_they_are() -> None:
    assert plan_pages(PLAIN, 10) == (Page(0, 1, "cells", 0, 10, 0, 10 * 40),)
