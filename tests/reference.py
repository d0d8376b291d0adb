"""Independent runners for tests: the whole model, and single stages, straight on llama.cpp.

This file must not import ``edgellm.engine``: it is what the engine is compared with. It uses
llama-cpp-python's ctypes layer and the ``gguf`` package, one sequence, one thread, and the
settings of reference mode (flash attention on, split KV cache, weights loaded without mmap).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgellm.modelfile.cut import ShardFile
from edgellm.modelfile.gguf import read_header

FloatRows = NDArray[np.float32]

_MROPE_TYPES = (8, 24, 40)
_FLASH_ATTENTION_ON = 1
_LOAD_MODE_NONE = 0


def _ggml() -> ctypes.CDLL:
    directory = Path(llama_cpp.__file__).parent / "lib"
    names = sorted(directory.glob("*ggml-base*"))
    if not names:
        raise RuntimeError(f"no ggml-base library in {directory}")
    library = ctypes.CDLL(str(names[0]))
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_data.restype = ctypes.c_void_p
    library.ggml_nbytes.restype = ctypes.c_size_t
    for function in (library.ggml_get_name, library.ggml_get_data, library.ggml_nbytes):
        function.argtypes = [ctypes.c_void_p]
    return library


GGML = _ggml()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp's log is dropped: what matters comes back as a return code."""


def set_fields(structure: Any, **values: Any) -> None:
    """Set fields of a ctypes structure; an unknown name is an error, not a new attribute."""
    known = {field[0] for field in structure._fields_}
    for name, value in values.items():
        if name not in known:
            raise AttributeError(f"{type(structure).__name__} has no field {name!r}")
        setattr(structure, name, value)


class _Runner:
    """A loaded model with one context of one sequence."""

    def __init__(
        self,
        path: Path,
        *,
        chunk: int,
        context: int,
        threads: int,
        evaluate: Any = None,
        fields: Mapping[str, Any] | None = None,
        adapters: Sequence[tuple[Path, float]] = (),
    ) -> None:
        """``fields`` are set in llama.cpp's context parameters; ``adapters`` are LoRA files with
        their scales."""
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        model_parameters = llama_cpp.llama_model_default_params()
        set_fields(model_parameters, n_gpu_layers=0, load_mode=_LOAD_MODE_NONE)
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode("utf-8"), model_parameters
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp refuses {path}")
        loaded = [self._adapter(adapter) for adapter, _ in adapters]
        parameters = llama_cpp.llama_context_default_params()
        set_fields(
            parameters,
            n_ctx=context,
            n_batch=chunk,
            n_ubatch=chunk,
            n_seq_max=1,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=_FLASH_ATTENTION_ON,
            kv_unified=False,
            no_perf=True,
        )
        if evaluate is not None:
            set_fields(parameters, cb_eval=evaluate)
        set_fields(parameters, **(fields or {}))
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        if loaded:
            handles = (ctypes.POINTER(ctypes.c_void_p) * len(loaded))(*loaded)
            scales = (ctypes.c_float * len(loaded))(*(scale for _, scale in adapters))
            llama_cpp.llama_set_adapters_lora(self.context, handles, len(loaded), scales)
        self.width = int(llama_cpp.llama_model_n_embd(self.model))
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.chunk = chunk

    def _adapter(self, path: Path) -> Any:
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode("utf-8"))
        if not adapter:
            raise RuntimeError(f"llama.cpp refuses {path}")
        return adapter

    def reset(self) -> None:
        """Forget every token."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def close(self) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
            llama_cpp.llama_model_free(self.model)
            self.context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _logits(self, rows: Sequence[int]) -> FloatRows:
        return np.stack(
            [
                np.ctypeslib.as_array(
                    llama_cpp.llama_get_logits_ith(self.context, row), (self.vocabulary,)
                ).copy()
                for row in rows
            ]
        )


class WholeModel(_Runner):
    """The undisturbed whole model: what every split run is compared with, bit for bit."""

    def __init__(
        self,
        path: Path,
        *,
        chunk: int = 128,
        context: int = 512,
        threads: int = 1,
        fields: Mapping[str, Any] | None = None,
        adapters: Sequence[tuple[Path, float]] = (),
    ) -> None:
        super().__init__(
            path, chunk=chunk, context=context, threads=threads, fields=fields, adapters=adapters
        )
        self._batch = llama_cpp.llama_batch_init(chunk, 0, 1)

    def decode(self, tokens: Sequence[int], position: int, *, every: bool = False) -> FloatRows:
        """Logits [1, vocabulary] after the last token, or [tokens, vocabulary] with ``every``.

        One ``llama_decode`` call: ``tokens`` must fit into one chunk.
        """
        count = len(tokens)
        if not 0 < count <= self.chunk:
            raise ValueError(f"{count} tokens do not fit a chunk of {self.chunk}")
        batch = self._batch
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(every or i == count - 1)
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return self._logits(range(count) if every else [count - 1])

    def prefill(self, tokens: Sequence[int]) -> FloatRows:
        """Logits [1, vocabulary] after a prompt that goes through in chunks, from position 0."""
        logits: FloatRows | None = None
        for begin in range(0, len(tokens), self.chunk):
            logits = self.decode(tokens[begin : begin + self.chunk], begin)
        if logits is None:
            raise ValueError("the prompt is empty")
        return logits


class StageRunner(_Runner):
    """One stage of a cut model: rows in, rows or logits out. Deliberately plain."""

    def __init__(
        self, shard: ShardFile, *, chunk: int = 128, context: int = 512, threads: int = 1
    ) -> None:
        self.shard = shard
        self._rows: FloatRows | None = None
        self._given: FloatRows | None = None
        self._outlet = f"{shard.residual_node}-{len(shard.span) - 1}".encode()
        self._inlet = shard.input_node.encode() if shard.input_node else None
        watches = self._inlet is not None or not shard.last
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._evaluate)
        super().__init__(
            shard.path,
            chunk=chunk,
            context=context,
            threads=threads,
            evaluate=self._callback if watches else None,
        )
        self._batch = llama_cpp.llama_batch_init(chunk, self.width, 1)
        self._sections = llama_cpp.llama_model_rope_type(self.model) in _MROPE_TYPES

    def _evaluate(self, tensor: int, ask: bool, data: int | None) -> bool:
        name = GGML.ggml_get_name(tensor)
        outlet = name == self._outlet and not self.shard.last
        if ask:
            return outlet or name == self._inlet
        address, size = GGML.ggml_get_data(tensor), GGML.ggml_nbytes(tensor)
        if outlet:
            raw = (ctypes.c_char * size).from_address(address)
            self._rows = np.frombuffer(raw, np.float32).reshape(-1, self.width).copy()
            return False
        if self._given is None or self._given.nbytes != size:
            return False
        ctypes.memmove(address, self._given.ctypes.data, size)
        return True

    def run(self, rows: FloatRows, position: int) -> FloatRows:
        """Rows [tokens, width] in; rows out, or logits [1, vocabulary] from the last stage."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        count = len(rows)
        if not 0 < count <= self.chunk or rows.shape[1] != self.width:
            raise ValueError(f"rows of shape {rows.shape} do not fit")
        batch = self._batch
        batch.n_tokens = count
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        line = np.arange(position, position + count, dtype=np.int32)
        if self._sections:
            line = np.concatenate([line, line, line, np.zeros(count, np.int32)])
        allocated, batch.pos = batch.pos, line.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        for i in range(count):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(not self.shard.last or i == count - 1)
        self._given, self._rows = rows, None
        status = llama_cpp.llama_decode(self.context, batch)
        batch.pos = allocated
        if self.shard.last:
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
            return self._logits([count - 1])
        return self._taken(status)

    def _taken(self, status: int) -> FloatRows:
        """What the callback copied; ending the graph early makes the status mean nothing."""
        if self._rows is None:
            raise RuntimeError(f"llama_decode returned {status}, no rows came out")
        return self._rows


class EmbeddingTable:
    """Token embeddings, dequantised by the ``gguf`` package."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        scale = header.metadata.get("edgellm.embedding.scale")
        self.scale = np.float32(scale.scalar() if scale is not None else 1.0)
        info = next(t for t in header.tensors if t.name == "token_embd.weight")
        raw = np.memmap(
            path, np.uint8, "r", info.offset, (info.shape[1], info.nbytes // info.shape[1])
        )
        self._raw = raw
        self._type = gguf.GGMLQuantizationType(info.type.id)

    def __call__(self, tokens: Sequence[int]) -> FloatRows:
        """Rows [tokens, width], scaled as the architecture wants."""
        picked = np.ascontiguousarray(self._raw[list(tokens)])
        rows = gguf.quants.dequantize(picked, self._type).astype(np.float32)
        return rows if self.scale == 1.0 else rows * self.scale
