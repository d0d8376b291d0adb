"""Write a GGUF: its header as bytes, and a whole file that appears complete or not at all.

This file may import the GGUF reader's types. It knows nothing of models or layers.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import DeviceError
from edgellm.modelfile.ggml_types import GgmlType
from edgellm.modelfile.gguf import DEFAULT_ALIGNMENT, MAGIC
from edgellm.modelfile.metadata import MetaValue

VERSION = 3
ALIGNMENT = DEFAULT_ALIGNMENT

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor to be written: ``shape`` in ggml's order, ``nbytes`` of data."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    nbytes: int


def padding(position: int) -> int:
    """Bytes from ``position`` to the next aligned one."""
    return -position % ALIGNMENT


def encode_header(metadata: Mapping[str, MetaValue], tensors: Sequence[TensorLayout]) -> bytes:
    """The header of a GGUF, padded so that tensor data may follow at once."""
    parts = [MAGIC, _U32.pack(VERSION), _U64.pack(len(tensors)), _U64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _U32.pack(value.type), value.raw]
    offset = 0
    for tensor in tensors:
        parts += [_text(tensor.name), _U32.pack(len(tensor.shape))]
        parts += [_U64.pack(size) for size in tensor.shape]
        parts += [_U32.pack(tensor.type.id), _U64.pack(offset)]
        offset += tensor.nbytes + padding(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(padding(len(header)))


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return _U64.pack(len(raw)) + raw


def file_bytes(header: bytes, tensors: Sequence[TensorLayout]) -> int:
    """Size of the whole file, every tensor padded."""
    return len(header) + sum(tensor.nbytes + padding(tensor.nbytes) for tensor in tensors)


def write_atomically(
    destination: Path, chunks: Iterable[bytes], *, aside: Path | None = None
) -> None:
    """Write ``chunks`` under a temporary name, make them durable, then give them their name.

    Nothing is ever visible under ``destination`` but the complete file; on any error the
    temporary file is removed. ``aside``: the folder of the temporary file, on the same file
    system; by default that of ``destination``. Raises ``DeviceError`` where the disk or
    directory refuses.
    """
    directory = destination.parent
    temporary: Path | None = None
    try:
        prefix = f".{destination.name[:80]}."
        handle, name = tempfile.mkstemp(prefix=prefix, dir=aside or directory)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(destination)
        temporary = None
        sync_directory(directory)
    except OSError as error:
        raise DeviceError(
            f"{destination} cannot be written: {error.strerror or error}.",
            hint="Check the free space and the permissions of its folder.",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def sync_directory(directory: Path) -> None:
    """Make the new name durable; not every system lets a directory be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
