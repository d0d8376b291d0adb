"""The messages of ONNX that a graph is made of, read with bounds; ``writing`` writes them.

This file may import ``protobuf`` and ``errors``. It validates what does not need the whole graph:
names, counts, element types and sizes of tensors, and that nothing inside a node names a file.
Field numbers are those of ``onnx.proto3``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edgellm.errors import ModelFileError, UnsupportedModelError
from edgellm.modelfile.onnx.protobuf import (
    BYTES,
    BufferSource,
    Field,
    Source,
    fields,
    float_of,
    integers,
)

MAX_DIMENSIONS = 8
MAX_DIMENSION = 1 << 40
MAX_NAME_BYTES = 4096
MAX_DEPTH = 8
"""Of graphs within nodes."""
MAX_ATTRIBUTE_INTS = 1 << 16
MAX_NODES = 1 << 18
MAX_IO = 1 << 12
"""Inputs or outputs of one node, or of a graph."""

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 7, 9, 10, 16
ELEMENT_BITS: Mapping[int, int] = MappingProxyType(
    {
        FLOAT: 32,
        UINT8: 8,
        INT8: 8,
        4: 16,  # uint16
        5: 16,  # int16
        INT32: 32,
        INT64: 64,
        BOOL: 8,
        FLOAT16: 16,
        11: 64,  # double
        12: 32,  # uint32
        13: 64,  # uint64
        BFLOAT16: 16,
        17: 8,  # float8e4m3fn
        18: 8,  # float8e4m3fnuz
        19: 8,  # float8e5m2
        20: 8,  # float8e5m2fnuz
        21: 4,  # uint4
        22: 4,  # int4
        23: 4,  # float4e2m1
    }
)
"""Bits of an element, by the number of its type. Strings have none, and are not weights."""

DOMAINS = frozenset(("", "ai.onnx", "ai.onnx.ml", "com.microsoft"))
"""Operators of other domains come as native libraries, or as functions in the file."""
REFUSED_OPERATORS = frozenset(("EPContext",))
"""It names a file with code for an accelerator."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the file tells it. Exactly one of the places is there, or none if it is empty.

    ``offset``: of its bytes in the same file. ``external``: key and value as told. ``inline``: its
    bytes, little endian. ``raw``: the message itself, where values are stored one by one.
    """

    name: str
    type: int
    dims: tuple[int, ...]
    nbytes: int
    offset: int | None = None
    external: Mapping[str, str] | None = None
    inline: bytes | None = None
    raw: bytes | None = None

    def integers(self) -> list[int] | None:
        """The values of a small inline integer tensor; None for any other."""
        if self.inline is None or self.type not in (INT32, INT64):
            return None
        size = ELEMENT_BITS[self.type] // 8
        return [
            int.from_bytes(self.inline[at : at + size], "little", signed=True)
            for at in range(0, len(self.inline), size)
        ]


@dataclass(frozen=True, slots=True)
class Attribute:
    """What the analysis asks of an attribute."""

    i: int = 0
    f: float = 0.0
    ints: tuple[int, ...] = ()
    tensor: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. ``captured``: names that graphs within it take from outside."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    raw: bytes = field(repr=False)
    """The message, to be copied as it is."""
    attributes_raw: tuple[tuple[str, bytes], ...] = field(repr=False, default=())
    captured: tuple[str, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Every name it reads."""
        return (*(name for name in self.inputs if name), *self.captured)

    def integer(self, name: str, default: int = 0) -> int:
        found = self.attributes.get(name)
        return default if found is None else found.i


Dim = int | str | None


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output: ``type`` 0 and ``dims`` None where the file does not say."""

    name: str
    type: int
    dims: tuple[Dim, ...] | None
    raw: bytes = field(repr=False, default=b"")


# --- reading --------------------------------------------------------------------------


def text(source: Source, found: Field, where: str, cap: int = MAX_NAME_BYTES) -> str:
    """A string field of at most ``cap`` bytes."""
    if found.wire != BYTES or found.end - found.begin > cap:
        raise ModelFileError(f"{where} is no text of at most {cap} bytes.", field=where)
    try:
        return source.read(found.begin, found.end - found.begin).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{where} is not UTF-8.", field=where) from error


def message(found: Field, where: str) -> tuple[int, int]:
    """The extent of a field that must be a message, or bytes."""
    if found.wire != BYTES:
        raise ModelFileError(f"{where} is no message.", field=where)
    return found.begin, found.end


def read_tensor(source: Source, begin: int, end: int, where: str, keep: int) -> Tensor:
    """A TensorProto. Its bytes are loaded where there are at most ``keep`` of them."""
    name, kind, location = "", 0, 0
    dims: list[int] = []
    external: dict[str, str] = {}
    data: tuple[int, int] | None = None
    other = False
    for found in fields(source, begin, end, where):
        if found.number == 1:
            dims += integers(source, found, f"{where}.dims", MAX_DIMENSIONS)
        elif found.number == 2:
            kind = found.value
        elif found.number == 8:
            name = text(source, found, f"{where}.name")
        elif found.number == 9 or (found.number == 4 and found.wire == BYTES):
            # Floats that are packed lie there as they do in raw data.
            if data is not None:
                raise ModelFileError(f"{where} has its data twice.", field=f"{where}.raw_data")
            data = message(found, f"{where}.raw_data")
            if found.number == 4:
                other = other or kind not in (0, FLOAT)
        elif found.number in (4, 5, 6, 7, 10, 11):
            other = True
        elif found.number == 3:
            raise UnsupportedModelError(f"{where} is a segment.", field=f"{where}.segment")
        elif found.number == 13:
            key, value = _entry(source, *message(found, f"{where}.external_data"), where)
            external[key] = value
        elif found.number == 14:
            location = found.value
    return _tensor(
        source, (begin, end), where, name, kind, dims, data, other, external, location, keep
    )


def _tensor(
    source: Source,
    extent: tuple[int, int],
    where: str,
    name: str,
    kind: int,
    dims: list[int],
    data: tuple[int, int] | None,
    other: bool,
    external: dict[str, str],
    location: int,
    keep: int,
) -> Tensor:
    bits = ELEMENT_BITS.get(kind)
    if bits is None:
        raise UnsupportedModelError(f"{where} is of element type {kind}.", field=f"{where}.type")
    if len(dims) > MAX_DIMENSIONS or any(not 0 <= d <= MAX_DIMENSION for d in dims):
        raise ModelFileError(f"{where} has the shape {dims[:9]}.", field=f"{where}.dims")
    nbytes = -(-math.prod(dims) * bits // 8)
    if nbytes > MAX_DIMENSION:
        raise ModelFileError(f"{where} would have {nbytes} bytes.", field=f"{where}.dims")
    if bool(external) != (location == 1) or location > 1:
        raise ModelFileError(
            f"{where} does not say clearly where its data is.", field=f"{where}.data_location"
        )
    shape = tuple(dims)
    if external:
        if data is not None or other:
            raise ModelFileError(f"{where} has its data twice.", field=f"{where}.raw_data")
        return Tensor(name, kind, shape, nbytes, external=MappingProxyType(external))
    if other:
        begin, end = extent
        if end - begin > max(keep, 1 << 16) or data is not None:
            raise UnsupportedModelError(
                f"{where} stores {nbytes} bytes value by value.", field=f"{where}.data"
            )
        raw = source.read(begin, end - begin)
        return Tensor(name, kind, shape, nbytes, inline=_listed(raw, kind, dims, where), raw=raw)
    if data is None:
        data = (0, 0)
    if data[1] - data[0] != nbytes:
        raise ModelFileError(
            f"{where} has {data[1] - data[0]} bytes of data; its shape needs {nbytes}.",
            field=f"{where}.raw_data",
        )
    if nbytes <= keep:
        return Tensor(name, kind, shape, nbytes, inline=source.read(data[0], nbytes))
    return Tensor(name, kind, shape, nbytes, offset=data[0])


def _listed(raw: bytes, kind: int, dims: list[int], where: str) -> bytes | None:
    """The bytes of integers that are stored one by one; None for other types."""
    if kind not in (INT32, INT64):
        return None
    source = BufferSource(raw)
    values: list[int] = []
    for found in fields(source, 0, len(raw), where):
        if found.number == (5 if kind == INT32 else 7):
            values += integers(source, found, where, 1 << 16)
    size = ELEMENT_BITS[kind] // 8
    if len(values) != math.prod(dims):
        raise ModelFileError(
            f"{where} has {len(values)} values for the shape {dims}.", field=f"{where}.data"
        )
    try:
        return b"".join(value.to_bytes(size, "little", signed=True) for value in values)
    except OverflowError as error:
        raise ModelFileError(f"{where} has values too large.", field=f"{where}.data") from error


def _entry(source: Source, begin: int, end: int, where: str) -> tuple[str, str]:
    pair = ["", ""]
    for found in fields(source, begin, end, f"{where}.external_data"):
        if found.number in (1, 2):
            pair[found.number - 1] = text(source, found, f"{where}.external_data")
    return pair[0], pair[1]


def read_value(source: Source, begin: int, end: int, where: str) -> Value:
    """A ValueInfoProto of a tensor."""
    name, kind = "", 0
    dims: tuple[Dim, ...] | None = None
    for found in fields(source, begin, end, where):
        if found.number == 1:
            name = text(source, found, f"{where}.name")
        elif found.number == 2:
            kind, dims = _type(source, *message(found, f"{where}.type"), where)
    if not name:
        raise ModelFileError(f"{where} has no name.", field=f"{where}.name")
    return Value(name, kind, dims, source.read(begin, end - begin))


def _type(source: Source, begin: int, end: int, where: str) -> tuple[int, tuple[Dim, ...] | None]:
    kind = 0
    dims: tuple[Dim, ...] | None = None
    for found in fields(source, begin, end, f"{where}.type"):
        if found.number != 1:
            continue
        for inner in fields(source, *message(found, f"{where}.type"), f"{where}.type"):
            if inner.number == 1:
                kind = inner.value
            elif inner.number == 2:
                dims = _shape(source, *message(inner, f"{where}.shape"), f"{where}.shape")
    return kind, dims


def _shape(source: Source, begin: int, end: int, where: str) -> tuple[Dim, ...]:
    dims: list[Dim] = []
    for found in fields(source, begin, end, where):
        if found.number != 1:
            continue
        dim: Dim = None
        for inner in fields(source, *message(found, where), where):
            if inner.number == 1:
                dim = inner.signed
            elif inner.number == 2:
                dim = text(source, inner, where) or None
        if (isinstance(dim, int) and dim < 0) or len(dims) >= MAX_DIMENSIONS:
            raise ModelFileError(f"{where} is no shape.", field=where)
        dims.append(dim)
    return tuple(dims)


def read_node(
    source: Source, begin: int, end: int, where: str, depth: int = 0, functions: bool = False
) -> Node:
    """A NodeProto with all that is in it. ``functions``: other domains are allowed.

    Raises UnsupportedModelError for operators that are not onnxruntime's own.
    """
    lists: tuple[list[str], list[str]] = ([], [])
    op = domain = ""
    attributes: dict[str, Attribute] = {}
    raws: list[tuple[str, bytes]] = []
    captured: list[str] = []
    for found in fields(source, begin, end, where):
        if found.number in (1, 2):
            names = lists[found.number - 1]
            names.append(text(source, found, f"{where}.name"))
            if len(names) > MAX_IO:
                raise ModelFileError(f"{where} has over {MAX_IO} inputs.", field=where)
        elif found.number == 4:
            op = text(source, found, f"{where}.op_type")
        elif found.number == 7:
            domain = text(source, found, f"{where}.domain")
        elif found.number == 5:
            extent = message(found, f"{where}.attribute")
            name, attribute, inner = _attribute(source, *extent, where, depth, functions)
            if name in attributes:
                raise ModelFileError(f"{where} has attribute {name[:80]!r} twice.", field=where)
            attributes[name] = attribute
            raws.append((name, source.read(extent[0], extent[1] - extent[0])))
            captured += inner
    if not op:
        raise ModelFileError(f"{where} has no operator.", field=f"{where}.op_type")
    if op in REFUSED_OPERATORS or (domain not in DOMAINS and not functions):
        raise UnsupportedModelError(
            f"{where} is {domain[:80] or 'ai.onnx'}:{op[:80]}, which is not run.",
            field=f"{where}.op_type",
        )
    inputs, outputs = lists
    return Node(
        op,
        "" if domain == "ai.onnx" else domain,
        tuple(inputs),
        tuple(outputs),
        MappingProxyType(attributes),
        source.read(begin, end - begin),
        tuple(raws),
        tuple(dict.fromkeys(captured)),
    )


def _attribute(
    source: Source, begin: int, end: int, where: str, depth: int, functions: bool
) -> tuple[str, Attribute, list[str]]:
    """An AttributeProto: name, what it holds, and what graphs in it take from outside."""
    name = ""
    i, f = 0, 0.0
    ints: list[int] = []
    tensor: Tensor | None = None
    captured: list[str] = []
    where = f"{where}.attribute"
    for found in fields(source, begin, end, where):
        if found.number == 1:
            name = text(source, found, f"{where}.name")
        elif found.number == 2:
            f = float_of(found)
        elif found.number == 3:
            i = found.signed
        elif found.number == 8:
            ints += integers(source, found, f"{where}.ints", MAX_ATTRIBUTE_INTS)
        elif found.number in (5, 10):
            tensor = read_tensor(source, *message(found, where), f"{where}.t", 1 << 16)
            _stays_inside(tensor, where)
        elif found.number in (6, 11):
            captured += read_subgraph(source, *message(found, where), where, depth + 1, functions)
        elif found.number in (22, 23):
            raise UnsupportedModelError(f"{where} is a sparse tensor.", field=where)
    return name, Attribute(i, f, tuple(ints), tensor), captured


def _stays_inside(tensor: Tensor, where: str) -> None:
    if tensor.external is not None:
        raise UnsupportedModelError(
            f"{where} names a file: only weights of the graph itself may.", field=where
        )


def read_subgraph(
    source: Source, begin: int, end: int, where: str, depth: int, functions: bool
) -> list[str]:
    """Check the graph within a node; returns the names that it takes from outside."""
    if depth > MAX_DEPTH:
        raise ModelFileError(f"{where}: graphs within graphs, over {MAX_DEPTH} deep.", field=where)
    own: set[str] = set()
    taken: list[str] = []
    nodes: list[Node] = []
    outputs: list[str] = []
    for found in fields(source, begin, end, where):
        if found.number == 1:
            extent = message(found, where)
            nodes.append(read_node(source, *extent, f"{where}.node", depth, functions))
            if len(nodes) > MAX_NODES:
                raise ModelFileError(f"{where} has over {MAX_NODES} nodes.", field=where)
        elif found.number == 5:
            tensor = read_tensor(source, *message(found, where), f"{where}.initializer", 1 << 16)
            _stays_inside(tensor, where)
            own.add(tensor.name)
        elif found.number == 11:
            own.add(read_value(source, *message(found, where), f"{where}.input").name)
        elif found.number == 12:
            outputs.append(read_value(source, *message(found, where), f"{where}.output").name)
        elif found.number == 15:
            raise UnsupportedModelError(f"{where} holds sparse tensors.", field=where)
    for node in nodes:
        taken += [name for name in node.takes if name not in own]
        own.update(node.outputs)
    return taken + [name for name in outputs if name not in own]
