"""Token embeddings without llama.cpp's graph: look up rows, dequantise them, scale them.

Used by the first stage of several. The table stays on disk: each row is read when it is asked
for, from the system's cache as a rule. (Mapped into memory, the table would soon count as ours.)
The dequantisation is ggml's own, so the rows are those that llama.cpp would compute, bit for bit.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edgellm.engine.base import Float32, Int32
from edgellm.engine.bindings import TO_FLOAT, ggml
from edgellm.errors import ModelFileError, StageError
from edgellm.modelfile.gguf import read_header

TENSOR = "token_embd.weight"


class Adapts(Protocol):
    """Adds to rows that were looked up: ``lookedup.EmbeddingAdapter``."""

    def rows(self, tokens: Int32 | None) -> Float32:
        """float32 [len(tokens), width]."""

    def close(self) -> None: ...


class EmbeddingTable:
    """``token_embd.weight`` [vocabulary, width] of a GGUF, dequantised row by row.

    ``name``: or another tensor of that kind. ``adapters`` add to the rows, before they are scaled.
    """

    def __init__(
        self,
        path: str,
        width: int,
        scale: float,
        name: str = TENSOR,
        adapters: Sequence[Adapts] = (),
    ) -> None:
        header = read_header(Path(path))
        tensor = next((t for t in header.tensors if t.name == name), None)
        if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != width:
            raise ModelFileError(
                f"the embedding shard holds no {name} of width {width}.", field=name
            )
        self._adapters = adapters
        self._width = width
        self._count = tensor.shape[1]
        self._scale = np.float32(scale)
        self._scaled = scale != 1.0
        self._stride = tensor.nbytes // self._count
        traits = ggml().ggml_get_type_traits(tensor.type.id).contents
        self._to_float = TO_FLOAT(traits.to_float) if traits.to_float else None
        self._start = tensor.offset
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def rows(self, tokens: Int32 | None) -> Float32:
        """float32 [len(tokens), width]. Raises StageError for a token outside the vocabulary."""
        if tokens is None or not len(tokens):
            raise StageError("the first stage was given no tokens.")
        if tokens.min() < 0 or tokens.max() >= self._count:
            raise StageError(f"a token id is outside the vocabulary of {self._count}.")
        raw = np.frombuffer(b"".join(map(self._read_row, tokens.tolist())), np.uint8)
        if self._to_float is None:  # float32 needs no conversion
            out = raw.view(np.float32).reshape(len(tokens), self._width)
        else:
            out = np.empty((len(tokens), self._width), np.float32)
            # Rows are whole blocks, so all of them convert in one call.
            self._to_float(
                raw.ctypes.data_as(ctypes.c_void_p),
                out.ctypes.data_as(ctypes.c_void_p),
                out.size,
            )
        for adapter in self._adapters:
            out = out + adapter.rows(tokens)
        return out * self._scale if self._scaled else out

    def _read_row(self, token: int) -> bytes:
        data = os.pread(self._file, self._stride, self._start + token * self._stride)
        if len(data) != self._stride:
            raise StageError("the embedding shard has shrunk.")
        return data

    def close(self) -> None:
        for adapter in self._adapters:
            adapter.close()
        os.close(self._file)
