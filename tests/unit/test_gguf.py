"""The bounded reader: the same answers as other readers, and a named field for each refusal."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from edgellm.errors import ModelFileError, UsageError
from edgellm.modelfile import read_header
from edgellm.modelfile.ggml_types import GGML_TYPES, ValueType
from edgellm.modelfile.gguf import MAX_ALIGNMENT, MAX_TENSORS
from edgellm.modelfile.metadata import (
    array_value,
    meta_integer,
    meta_number,
    meta_per_layer,
    meta_string,
    scalar_value,
)
from tests.tinymodels import write_tiny_model


def text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, ValueType.UINT32, struct.pack("<I", value))


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def build(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF made by hand, wrong wherever a test wants it to be."""
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensor_count, pair_count)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def refused(tmp_path: Path, content: bytes) -> ModelFileError:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert caught.value.exit_code == 5
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.parametrize("name", ["llama", "phi3", "lfm2", "qwen3moe"])
def test_agrees_with_the_gguf_package(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(name, tmp_path)
    header = read_header(path)
    oracle = gguf.GGUFReader(path)
    assert header.data_offset == oracle.data_offset
    assert header.file_size == path.stat().st_size
    fields = {key: f for key, f in oracle.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        value = header.metadata[key]
        mine = list(value.items()) if value.is_array else value.scalar()
        assert mine == field.contents(), key
    assert [t.name for t in header.tensors] == [t.name for t in oracle.tensors]
    for mine_t, theirs in zip(header.tensors, oracle.tensors, strict=True):
        assert mine_t.shape == tuple(int(size) for size in theirs.shape)
        assert mine_t.type.id == int(theirs.tensor_type)
        assert (mine_t.offset, mine_t.nbytes) == (theirs.data_offset, theirs.n_bytes)


def test_type_table_is_the_library_s() -> None:
    """Block and byte sizes of every type, asked of ggml itself; none is missing."""
    from tests.reference import GGML

    GGML.ggml_blck_size.restype = GGML.ggml_type_size.restype = ctypes.c_int64
    for number in range(43):
        block = GGML.ggml_blck_size(number)
        kind = GGML_TYPES.get(number)
        if block == 0:
            assert kind is None, number
            continue
        assert kind is not None, number
        assert (kind.block, kind.size) == (block, GGML.ggml_type_size(number)), kind.name


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.gguf"
    path.write_bytes(build((u32("a.b", 7),), version=2))
    assert meta_integer(read_header(path).metadata, "a.b") == 7


def test_digest_depends_on_header_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = build((u32("a.b", 7),), (tensor("t", (8,)),), data=bytes(32))
    path.write_bytes(content)
    first = read_header(path).header_digest
    path.write_bytes(content + b"x")
    longer = read_header(path).header_digest
    path.write_bytes(build((u32("a.b", 8),), (tensor("t", (8,)),), data=bytes(32)))
    other = read_header(path).header_digest
    assert len({first, longer, other}) == 3


# --- what is no model file at all -----------------------------------------------------


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_header(tmp_path / "none.gguf")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError):
        read_header("a\x00b.gguf")


def test_directories_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="directory"):
        read_header(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it would wait for a writer for ever
    with pytest.raises(ModelFileError, match="special file"):
        read_header(pipe)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 not a model", b"GGUF", b"\x00" * 64])
def test_no_gguf(content: bytes, tmp_path: Path) -> None:
    assert refused(tmp_path, content).field in {"magic", "version"}


# --- every part of the header ---------------------------------------------------------


def string_array(count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", ValueType.STRING, count) + body


HUGE = 1 << 62
BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "version 1": (build(version=1), "version"),
    "version 4": (build(version=4), "version"),
    "big endian": (build(version=3 << 24), "version"),
    "tensor count": (build(counts=(MAX_TENSORS + 1, 0)), "tensor_count"),
    "huge tensor count": (build(counts=((1 << 64) - 1, 0)), "tensor_count"),
    "metadata count": (build(counts=(0, HUGE)), "metadata_count"),
    "count beyond the file": (build(counts=(0, 60000)), "metadata[0].key"),
    "empty key": (build((u32("", 1),)), "metadata[0].key"),
    "long key": (
        build((struct.pack("<Q", 1 << 20) + b"x" * 100,), counts=(0, 1)),
        "metadata[0].key.length",
    ),
    "key not UTF-8": (build((struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8),)), "metadata[0].key"),
    "key twice": (build((u32("a.b", 1), u32("a.b", 2))), "a.b"),
    "unknown value type": (build((pair("a.b", 13, b""),)), "a.b.type"),
    "string length": (build((pair("a.b", 8, struct.pack("<Q", HUGE)),)), "a.b.length"),
    "string beyond the file": (build((pair("a.b", 8, struct.pack("<Q", 5000)),)), "a.b"),
    "nested array": (build((pair("a.b", 9, struct.pack("<IQ", 9, 1)),)), "a.b"),
    "array count": (build((pair("a.b", 9, struct.pack("<IQ", 4, HUGE)),)), "a.b.count"),
    "array beyond the file": (build((pair("a.b", 9, struct.pack("<IQ", 4, 999)),)), "a.b.count"),
    "array element type": (build((pair("a.b", 9, struct.pack("<IQ", 99, 1)),)), "a.b.element.type"),
    "string array item": (
        build((pair("a.b", 9, string_array(1, struct.pack("<Q", HUGE))),)),
        "a.b",
    ),
    "boolean of 2": (build((pair("a.b", 7, b"\x02"),)), "a.b"),
    "alignment 0": (build((u32("general.alignment", 0),)), "general.alignment"),
    "alignment 24": (build((u32("general.alignment", 24),)), "general.alignment"),
    "alignment too large": (
        build((u32("general.alignment", MAX_ALIGNMENT * 2),)),
        "general.alignment",
    ),
    "alignment no integer": (
        build((pair("general.alignment", 8, text("32")),)),
        "general.alignment",
    ),
    "tensor name empty": (build((), (tensor("", (8,)),)), "tensor[0].name"),
    "tensor name long": (build((), (tensor("n" * 64, (8,)),)), "tensor[0].name.length"),
    "tensor name with NUL": (build((), (tensor("a\x00b", (8,)),)), "tensor[0].name"),
    "tensor name twice": (
        build((), (tensor("t", (8,)), tensor("t", (8,), 0, 32)), data=bytes(64)),
        "tensor[1].name",
    ),
    "five dimensions": (build((), (tensor("t", (1, 1, 1, 1, 1)),)), "t.dimensions"),
    "dimension 0": (build((), (tensor("t", (8, 0)),)), "t.shape"),
    "shape overflow": (build((), (tensor("t", (1 << 32, 1 << 32)),)), "t.shape"),
    "element type": (build((), (tensor("t", (8,), 4),)), "t.type"),
    "element type beyond": (build((), (tensor("t", (8,), 4_000_000),)), "t.type"),
    "row no whole blocks": (build((), (tensor("t", (33,), 2),)), "t.shape"),
    "offset unaligned": (build((), (tensor("t", (8,), 0, 4),), data=bytes(64)), "t.offset"),
    "overlap": (
        build((), (tensor("t", (64,)), tensor("u", (8,), 0, 32)), data=bytes(512)),
        "u.offset",
    ),
    "data beyond the file": (build((), (tensor("t", (64,)),), data=bytes(255)), "t.data"),
    "offset beyond the file": (build((), (tensor("t", (8,), 0, HUGE),)), "t.offset"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header_names_its_field(name: str, tmp_path: Path) -> None:
    content, field = BAD_HEADERS[name]
    began = time.process_time()
    assert refused(tmp_path, content).field == field
    assert time.process_time() - began < 1.0


def test_good_header_made_by_the_same_hand(tmp_path: Path) -> None:
    """The builder itself is right: without a defect, nothing is refused."""
    path = tmp_path / "good.gguf"
    pairs = (u32("general.alignment", 64), pair("a.c", 7, b"\x01"))
    tensors = (tensor("t", (32, 2), 2), tensor("u", (), 0, 64))
    path.write_bytes(build(pairs, tensors, data=bytes(68), alignment=64))
    header = read_header(path)
    assert header.alignment == 64
    assert [(t.nbytes, t.offset - header.data_offset) for t in header.tensors] == [(36, 0), (4, 64)]


# --- size and speed -------------------------------------------------------------------


def test_large_vocabulary_is_fast(tmp_path: Path) -> None:
    """152,000 tokens, scores, types and merges in well under a second."""
    count = 152_000
    tokens = b"".join(text(f"token{i}") for i in range(count))
    numbers = struct.pack("<IQ", ValueType.FLOAT32, count) + bytes(4 * count)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(
        build(
            (
                pair("tokenizer.ggml.tokens", 9, string_array(count, tokens)),
                pair("tokenizer.ggml.merges", 9, string_array(count, tokens)),
                pair("tokenizer.ggml.scores", 9, numbers),
            )
        )
    )
    began = time.process_time()
    header = read_header(path)
    assert time.process_time() - began < 2.0  # 0.1 s; a loop in Python a token would take more
    assert header.metadata["tokenizer.ggml.tokens"].items()[-1] == f"token{count - 1}"


def test_reading_needs_no_third_party() -> None:
    """A bad file must be refused at once: no numpy, no native code on the way."""
    code = (
        "import sys, edgellm.modelfile, edgellm.modelfile.cut;"
        "sys.exit(any(m in sys.modules for m in ('numpy', 'llama_cpp', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- metadata values ------------------------------------------------------------------


def test_values_survive_encoding() -> None:
    assert scalar_value(ValueType.INT16, -3).scalar() == -3
    assert scalar_value(ValueType.STRING, "päth").scalar() == "päth"
    assert array_value(ValueType.STRING, ["a", "", "ü"]).items() == ("a", "", "ü")
    assert array_value(ValueType.BOOL, [True, False]).items() == (True, False)


def test_strings_that_are_not_utf8_are_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "latin.gguf"
    raw = struct.pack("<Q", 2) + b"\xe9!"
    path.write_bytes(build((pair("a.b", 8, raw),)))
    value = read_header(path).metadata["a.b"]
    assert value.scalar() == "\ufffd!"
    assert value.raw == raw


def test_wrong_kinds_of_values_are_refused() -> None:
    metadata = {
        "s": scalar_value(ValueType.STRING, "x"),
        "i": scalar_value(ValueType.UINT32, 5),
        "f": scalar_value(ValueType.FLOAT32, 0.5),
        "l": array_value(ValueType.UINT32, [1, 2, 3]),
        "m": array_value(ValueType.STRING, ["x"]),
    }
    assert meta_integer(metadata, "none") is None
    assert meta_number(metadata, "i") == 5.0
    assert meta_number(metadata, "f") == 0.5
    assert meta_per_layer(metadata, "i", 2) == [5, 5]
    assert meta_per_layer(metadata, "l", 3) == [1, 2, 3]
    for call in (
        lambda: meta_integer(metadata, "s"),
        lambda: meta_string(metadata, "i"),
        lambda: meta_number(metadata, "s"),
        lambda: meta_per_layer(metadata, "l", 4),
        lambda: meta_per_layer(metadata, "m", 1),
        metadata["l"].scalar,
        metadata["i"].items,
    ):
        with pytest.raises(ModelFileError):
            call()
