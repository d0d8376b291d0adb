"""GGUF metadata values: kept as the file's own bytes, decoded on demand, encoded exactly.

This file may import ``errors`` and the type tables. It reads and writes no files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.errors import ModelFileError
from edgellm.modelfile.ggml_types import INTEGER_TYPES, SCALAR_FORMATS, ValueType

_U64 = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class MetaValue:
    """One metadata value, kept as the bytes of the file so that it can be rewritten exactly.

    ``raw`` is what follows the type tag: for an array that includes its element type and count.
    A vocabulary of 152,000 strings is never decoded unless asked for.
    """

    type: ValueType
    raw: bytes
    element: ValueType | None = None
    count: int = 1

    def scalar(self) -> Scalar:
        """The value of a scalar or string; bytes that are not UTF-8 are replaced.

        Raises ``ModelFileError`` for an array.
        """
        if self.type is ValueType.ARRAY:
            raise ModelFileError("a metadata value is an array where one value is expected.")
        if self.type is ValueType.STRING:
            return self.raw[8:].decode("utf-8", errors="replace")
        value: Scalar = struct.unpack("<" + SCALAR_FORMATS[self.type], self.raw)[0]
        return value

    def items(self) -> tuple[Scalar, ...]:
        """The elements of an array; raises ``ModelFileError`` for anything else."""
        if self.element is None:
            raise ModelFileError("a metadata value is one value where an array is expected.")
        if self.element is not ValueType.STRING:
            layout = f"<{self.count}{SCALAR_FORMATS[self.element]}"
            return struct.unpack_from(layout, self.raw, _ARRAY_HEAD.size)
        found = []
        position = _ARRAY_HEAD.size
        for _ in range(self.count):
            (size,) = _U64.unpack_from(self.raw, position)
            text = self.raw[position + 8 : position + 8 + size]
            found.append(text.decode("utf-8", errors="replace"))
            position += 8 + size
        return tuple(found)

    @property
    def is_array(self) -> bool:
        return self.element is not None


def _encode(kind: ValueType, value: Scalar) -> bytes:
    if kind is ValueType.STRING:
        text = str(value).encode("utf-8")
        return _U64.pack(len(text)) + text
    return struct.pack("<" + SCALAR_FORMATS[kind], value)


def scalar_value(kind: ValueType, value: Scalar) -> MetaValue:
    """Encode one scalar or string."""
    return MetaValue(kind, _encode(kind, value))


def array_value(element: ValueType, items: Sequence[Scalar]) -> MetaValue:
    """Encode an array of scalars or strings."""
    head = _ARRAY_HEAD.pack(element, len(items))
    raw = head + b"".join(_encode(element, item) for item in items)
    return MetaValue(ValueType.ARRAY, raw, element, len(items))


def meta_integer(metadata: Mapping[str, MetaValue], key: str) -> int | None:
    """The integer under ``key``, or None; ``ModelFileError`` where it is of another type."""
    value = metadata.get(key)
    if value is None:
        return None
    if value.type not in INTEGER_TYPES:
        raise ModelFileError(f"metadata {key!r} is not an integer.", field=key)
    return int(value.scalar())


def meta_number(metadata: Mapping[str, MetaValue], key: str) -> float | None:
    """The float or integer under ``key``; None and ``ModelFileError`` as in ``meta_integer``."""
    value = metadata.get(key)
    if value is None:
        return None
    if value.type not in INTEGER_TYPES | {ValueType.FLOAT32, ValueType.FLOAT64}:
        raise ModelFileError(f"metadata {key!r} is not a number.", field=key)
    return float(value.scalar())


def meta_string(metadata: Mapping[str, MetaValue], key: str) -> str | None:
    """The string under ``key``; None and ``ModelFileError`` as in ``meta_integer``."""
    value = metadata.get(key)
    if value is None:
        return None
    if value.type is not ValueType.STRING:
        raise ModelFileError(f"metadata {key!r} is not a string.", field=key)
    return str(value.scalar())


def meta_per_layer(metadata: Mapping[str, MetaValue], key: str, layers: int) -> list[int] | None:
    """Integers under ``key``, one a layer; a single value stands for every layer.

    None where there is none. Raises ``ModelFileError`` if the array is not ``layers`` long
    or does not hold integers.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if not value.is_array:
        return [meta_integer(metadata, key) or 0] * layers
    if value.element not in INTEGER_TYPES | {ValueType.BOOL}:
        raise ModelFileError(f"metadata {key!r} does not hold integers.", field=key)
    if value.count != layers:
        raise ModelFileError(
            f"metadata {key!r} holds {value.count} values for {layers} layers.", field=key
        )
    return [int(item) for item in value.items()]
