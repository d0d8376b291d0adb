"""LoRA adapters of token embeddings, for the first of several stages, which looks its tokens up.

This file runs in a stage process only. What llama.cpp adds to a looked-up row is the product of the
adapter's row of that token and its other half. That product is left to ggml, in the number of
threads that the whole model would use, so that the rows are llama.cpp's bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.engine.base import Float32, Int32, StageConfig
from edgellm.engine.bindings import llama
from edgellm.engine.embedding import TENSOR, EmbeddingTable
from edgellm.errors import ModelFileError, StageError
from edgellm.modelfile.gguf import read_header
from edgellm.modelfile.metadata import meta_number

_F32 = 0
_WORK_BYTES = 1 << 20
"""For ggml's own notes in a call, beside rows and their copies."""
_COPIES = 4
"""Of the rows in a call: as they are, as a kernel wants them, and what comes of them."""


class EmbeddingAdapter:
    """One adapter's part of the token embeddings; scale and alpha as llama.cpp counts them."""

    def __init__(self, path: str, width: int, scale: float, threads: int) -> None:
        header = read_header(Path(path))
        half = next((t for t in header.tensors if t.name == f"{TENSOR}.lora_b"), None)
        if half is None or len(half.shape) != 2 or half.shape[1] != width:
            raise ModelFileError(f"{path} adapts no embeddings of width {width}.", field=TENSOR)
        self._rank = half.shape[0]
        self._width = width
        self._threads = threads
        self._table = EmbeddingTable(path, self._rank, 1.0, f"{TENSOR}.lora_a")
        # In float32, and in this order, as everything there.
        factor = np.float32(scale)
        alpha = np.float32(meta_number(header.metadata, "adapter.lora.alpha") or 0.0)
        self._factor = factor * alpha / np.float32(self._rank) if alpha else factor
        self._ggml = ggml_with_kernels()
        self._kept = _Arena(self._ggml, half.nbytes)
        self._half = self._kept.matrix(half.type.id, self._rank, width)
        with Path(path).open("rb") as file:
            file.seek(half.offset)
            data = file.read(half.nbytes)
        if len(data) != half.nbytes or self._ggml.ggml_nbytes(self._half) != half.nbytes:
            raise StageError("an adapter of the embeddings has shrunk.")
        ctypes.memmove(self._ggml.ggml_get_data(self._half), data, half.nbytes)

    def rows(self, tokens: Int32 | None) -> Float32:
        """float32 [len(tokens), width]: what is to be added to the rows of ``tokens``."""
        given = np.ascontiguousarray(self._table.rows(tokens))
        count = len(given)
        out = np.empty((count, self._width), np.float32)
        room = _COPIES * 4 * count * (self._rank + self._width)
        arena = _Arena(self._ggml, room)
        try:
            right = arena.matrix(_F32, self._rank, count)
            ctypes.memmove(self._ggml.ggml_get_data(right), given.ctypes.data, given.nbytes)
            product = arena.compute(self._half, right, self._threads)
            ctypes.memmove(out.ctypes.data, self._ggml.ggml_get_data(product), out.nbytes)
        finally:
            arena.close()
        return out * self._factor

    def close(self) -> None:
        self._table.close()
        self._kept.close()


def embedding_adapters(config: StageConfig, width: int) -> list[EmbeddingAdapter]:
    """Those of a stage. Raises StageError and ModelFileError."""
    threads = config.settings.threads
    return [
        EmbeddingAdapter(path, width, scale, threads) for path, scale in config.embedding_adapters
    ]


class _Arena:
    """A piece of memory of ggml's, with tensors in it."""

    def __init__(self, library: Any, nbytes: int) -> None:
        self._ggml = library
        self._context = library.ggml_init(_Parameters(nbytes + _WORK_BYTES, None, False))
        if not self._context:
            raise StageError("no memory for the adapter of the embeddings.")

    def matrix(self, kind: int, columns: int, rows: int) -> Any:
        return self._ggml.ggml_new_tensor_2d(self._context, kind, columns, rows)

    def compute(self, left: Any, right: Any, threads: int) -> Any:
        """The product of two matrices, as ggml orders them. Raises StageError."""
        product = self._ggml.ggml_mul_mat(self._context, left, right)
        graph = self._ggml.ggml_new_graph(self._context)
        self._ggml.ggml_build_forward_expand(graph, product)
        status = self._ggml.ggml_graph_compute_with_ctx(self._context, graph, threads)
        if status != 0:
            raise StageError(f"ggml did not compute an adapter (status {status}).")
        return product

    def close(self) -> None:
        self._ggml.ggml_free(self._context)


class _Parameters(ctypes.Structure):
    """``struct ggml_init_params`` of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@functools.cache
def ggml_with_kernels() -> Any:
    """libggml with the processor's kernels, and the signatures of what is called above.

    Raises StageError where a build of llama.cpp keeps them elsewhere.
    """
    llama()  # makes the next line possible
    from llama_cpp import _ggml  # noqa: PLC0415

    library = ctypes.CDLL(_ggml.libggml._name)  # an object of our own: signatures are ours as well
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [_Parameters]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, size, size]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
    ):
        function = getattr(library, name, None)
        if function is None:
            raise StageError(
                "this build of llama.cpp cannot adapt token embeddings in a model that is cut.",
                hint="Run it on one device, or leave that --lora out.",
            )
        function.restype, function.argtypes = result, arguments
    return library
