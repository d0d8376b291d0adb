"""A bounded reader of GGUF headers: parse the file, or raise a typed error that names the field.

This file may import ``errors`` and the type tables; it must not import numpy or any native
code, so that a bad file is refused fast and before llama.cpp sees it. Every size and offset
is a Python integer, checked against the size of the file before anything is read or allocated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
The rules are those of llama.cpp's own loader (tensors follow each other without gaps or overlap,
names shorter than 64 bytes, at most four dimensions), and caps on every count.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from edgellm.errors import ModelFileError, UsageError
from edgellm.modelfile.ggml_types import (
    GGML_TYPES,
    SCALAR_SIZES,
    GgmlType,
    ValueType,
)
from edgellm.modelfile.metadata import MetaValue

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Some ten times what the largest real models have, and little enough to refuse within a second.
MAX_HEADER_BYTES = 1 << 27
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_ITEMS = 1 << 22
MAX_ALIGNMENT = 1 << 16
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4

_CHUNK = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is in ggml's order: ``shape[0]`` is the length of a row."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    """Absolute, bytes from the beginning of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything a GGUF says before its tensor data, validated."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, MetaValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int
    header_digest: str
    """SHA-256, hex, of the header's bytes followed by the file's size as 8 bytes, little endian."""


class _Window:
    """The part of the file read so far; grows on demand, never beyond the file or the cap."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.limit = min(size, MAX_HEADER_BYTES)
        self.size = size
        self.data = bytearray()
        self.position = 0

    def need(self, count: int, field: str) -> int:
        """Have ``count`` more bytes in ``data``; returns where they begin and steps over them."""
        begin = self.position
        end = begin + count
        if end > self.limit:
            if end <= self.size:
                raise ModelFileError(
                    f"the header is larger than {MAX_HEADER_BYTES >> 20} MiB.", field=field
                )
            raise ModelFileError(
                f"the file ends within its header, in {field}.",
                field=field,
                hint="It is truncated or damaged: fetch it again.",
            )
        while len(self.data) < end:
            piece = self._file.read(max(end - len(self.data), _CHUNK))
            if not piece:
                raise ModelFileError(f"the file became shorter while reading {field}.", field=field)
            self.data += piece
        self.position = end
        return begin

    def u32(self, field: str) -> int:
        value: int = _U32.unpack_from(self.data, self.need(4, field))[0]
        return value

    def u64(self, field: str) -> int:
        value: int = _U64.unpack_from(self.data, self.need(8, field))[0]
        return value

    def text(self, field: str, cap: int) -> str:
        size = self.u64(f"{field}.length")
        if size > cap:
            raise ModelFileError(
                f"{field} is {size} bytes long; the limit is {cap}.", field=f"{field}.length"
            )
        begin = self.need(size, field)
        try:
            return self.data[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{field} is not UTF-8.", field=field) from error

    def skip_strings(self, count: int, field: str) -> None:
        """Step over ``count`` strings, checking each length against what is left of the file."""
        unpack = _U64.unpack_from
        for _ in range(count):
            begin = self.position
            # The quick way for what is already read; `need` gives every error its words.
            if begin + 8 > len(self.data):
                self.need(8, field)
                self.position = begin
            size = unpack(self.data, begin)[0]
            if size > MAX_STRING_BYTES:
                raise ModelFileError(
                    f"a string in {field} is {size} bytes long; the limit is {MAX_STRING_BYTES}.",
                    field=field,
                )
            end = begin + 8 + size
            if end > len(self.data):
                self.need(8 + size, field)
            self.position = end


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and validate the header of one GGUF file; tensor data is not read.

    Raises ``UsageError`` for a missing or unreadable file, and ``ModelFileError`` (with
    ``field``) for anything in the file that is not as it must be.
    """
    where = Path(path)
    try:
        mode = where.stat().st_mode  # before opening: a pipe would wait for its writer
        if not stat.S_ISREG(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "a special file"
            raise ModelFileError(f"{where} is {what}, not a model file.", field="file")
        with where.open("rb") as file:
            return _parse(_Window(file, os.fstat(file.fileno()).st_size), where)
    except FileNotFoundError as error:
        raise UsageError(
            f"model file {where} does not exist.", hint="Check the path given with --model."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        raise UsageError(f"model file {where} cannot be read: {error}.") from error
    except ModelFileError as error:
        if str(where) not in error.message:
            error.message = f"{where}: {error.message}"
        raise


def _parse(window: _Window, path: Path) -> GgufHeader:
    begin = window.need(4, "magic")
    if bytes(window.data[begin : begin + 4]) != MAGIC:
        raise ModelFileError("not a GGUF file: its first four bytes differ.", field="magic")
    version = window.u32("version")
    if version & 0xFFFF == 0 and version != 0:
        raise ModelFileError("this GGUF is big endian, which is not supported.", field="version")
    if version not in (2, 3):
        raise ModelFileError(f"GGUF version {version} is not 2 or 3.", field="version")
    tensor_count = _count(window, "tensor_count", MAX_TENSORS)
    metadata_count = _count(window, "metadata_count", MAX_METADATA)
    metadata: dict[str, MetaValue] = {}
    for index in range(metadata_count):
        key = window.text(f"metadata[{index}].key", MAX_KEY_BYTES)
        if not key:
            raise ModelFileError("a metadata key is empty.", field=f"metadata[{index}].key")
        if key in metadata:
            raise ModelFileError(f"metadata key {_short(key)!r} appears twice.", field=_short(key))
        metadata[key] = _value(window, _short(key))
    alignment = _alignment(metadata)
    tensors = _tensors(window, tensor_count)
    header_end = window.position
    data_offset = header_end + -header_end % alignment
    placed = _place(tensors, data_offset, alignment, window.size)
    digest = hashlib.sha256(window.data[:header_end])
    digest.update(_U64.pack(window.size))
    return GgufHeader(
        path=path,
        version=version,
        alignment=alignment,
        metadata=MappingProxyType(metadata),
        tensors=placed,
        data_offset=data_offset,
        file_size=window.size,
        header_digest=digest.hexdigest(),
    )


def _count(window: _Window, field: str, cap: int) -> int:
    count = window.u64(field)
    if count > cap:
        raise ModelFileError(f"{field} is {count}; the limit is {cap}.", field=field)
    return count


def _short(name: str) -> str:
    """A name that came from the file, cut to what a message can carry."""
    return name if len(name) <= 80 else name[:77] + "..."


def _value_type(window: _Window, field: str) -> ValueType:
    number = window.u32(f"{field}.type")
    try:
        return ValueType(number)
    except ValueError:
        raise ModelFileError(
            f"metadata {field!r} has the unknown value type {number}.", field=f"{field}.type"
        ) from None


def _value(window: _Window, field: str) -> MetaValue:
    kind = _value_type(window, field)
    begin = window.position
    element: ValueType | None = None
    count = 1
    if kind is ValueType.STRING:
        size = window.u64(f"{field}.length")
        if size > MAX_STRING_BYTES:
            raise ModelFileError(
                f"metadata {field!r} is {size} bytes long; the limit is {MAX_STRING_BYTES}.",
                field=f"{field}.length",
            )
        window.need(size, field)
    elif kind is ValueType.ARRAY:
        element = _value_type(window, f"{field}.element")
        if element is ValueType.ARRAY:
            raise ModelFileError(f"metadata {field!r} is a nested array.", field=field)
        count = _array_count(window, field, element)
        if element is ValueType.STRING:
            window.skip_strings(count, field)
        else:
            window.need(count * SCALAR_SIZES[element], field)
    else:
        window.need(SCALAR_SIZES[kind], field)
    raw = bytes(window.data[begin : window.position])
    bools = raw if kind is ValueType.BOOL else raw[12:] if element is ValueType.BOOL else b""
    if bools.strip(b"\x00\x01"):
        raise ModelFileError(f"metadata {field!r} holds a boolean that is not 0 or 1.", field=field)
    return MetaValue(kind, raw, element, count)


def _array_count(window: _Window, field: str, element: ValueType) -> int:
    count = window.u64(f"{field}.count")
    smallest = SCALAR_SIZES.get(element, 8)  # a string is at least its 8-byte length
    if count > MAX_ARRAY_ITEMS or count * smallest > window.limit - window.position:
        raise ModelFileError(
            f"metadata {field!r} claims {count} items, more than the file can hold.",
            field=f"{field}.count",
        )
    return count


def _alignment(metadata: Mapping[str, MetaValue]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    alignment = value.scalar() if value.type is ValueType.UINT32 else 0
    if (
        not isinstance(alignment, int)
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise ModelFileError(
            f"general.alignment must be a power of two up to {MAX_ALIGNMENT}.",
            field="general.alignment",
        )
    return alignment


@dataclass(frozen=True, slots=True)
class _RawTensor:
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    relative: int


def _tensors(window: _Window, count: int) -> list[_RawTensor]:
    tensors: list[_RawTensor] = []
    seen: set[str] = set()
    for index in range(count):
        name = window.text(f"tensor[{index}].name", MAX_TENSOR_NAME_BYTES)
        if not name or name in seen or "\x00" in name:
            reason = "appears twice" if name in seen else "is empty or holds a NUL"
            raise ModelFileError(f"tensor name {name!r} {reason}.", field=f"tensor[{index}].name")
        seen.add(name)
        tensors.append(_tensor(window, name))
    return tensors


def _tensor(window: _Window, name: str) -> _RawTensor:
    dimensions = window.u32(f"{name}.dimensions")
    if dimensions > MAX_DIMENSIONS:
        raise ModelFileError(
            f"tensor {name!r} has {dimensions} dimensions; the limit is {MAX_DIMENSIONS}.",
            field=f"{name}.dimensions",
        )
    shape = tuple(window.u64(f"{name}.shape") for _ in range(dimensions))
    number = window.u32(f"{name}.type")
    offset = window.u64(f"{name}.offset")
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise ModelFileError(
            f"tensor {name!r} has the unknown element type {number}.", field=f"{name}.type"
        )
    if any(size == 0 for size in shape) or math.prod(shape) >= 1 << 63:
        raise ModelFileError(f"tensor {name!r} has the shape {shape}.", field=f"{name}.shape")
    if (shape[0] if shape else 1) % kind.block:
        raise ModelFileError(
            f"a row of tensor {name!r} is not a multiple of {kind.block}, as {kind.name} wants.",
            field=f"{name}.shape",
        )
    return _RawTensor(name, shape, kind, offset)


def _place(
    tensors: list[_RawTensor], data_offset: int, alignment: int, file_size: int
) -> tuple[TensorInfo, ...]:
    """Absolute places. Each tensor begins where the padding of the one before ends: no overlap."""
    placed = []
    expected = 0
    for tensor in tensors:
        if tensor.relative != expected:
            raise ModelFileError(
                f"tensor {tensor.name!r} lies at offset {tensor.relative}, expected {expected}.",
                field=f"{tensor.name}.offset",
            )
        nbytes = tensor.type.row_bytes(math.prod(tensor.shape))
        begin = data_offset + tensor.relative
        if begin + nbytes > file_size:
            raise ModelFileError(
                f"tensor {tensor.name!r} ends at byte {begin + nbytes},"
                f" but the file has {file_size}.",
                field=f"{tensor.name}.data",
                hint="It is truncated or damaged: fetch it again.",
            )
        placed.append(TensorInfo(tensor.name, tensor.shape, tensor.type, begin, nbytes))
        expected += nbytes + -nbytes % alignment
    return tuple(placed)
