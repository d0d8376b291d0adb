"""The llama.cpp engine: one span of layers of an unpatched llama.cpp, through ctypes.

This file runs in a stage process only, never in a node: llama.cpp aborts on what it does not
like. It trusts its inputs: files were validated by ``modelfile``, rows by ``runner``.

How a middle stage works without patching: its shard is an ordinary GGUF of just its layers;
rows enter through ``llama_batch.embd``; and ``cb_eval`` stops the graph at the last layer's
residual node, copying it out, so that the final norm and the head are never computed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.engine.base import Decoded, Float32, Int32, SlotRow, StageConfig
from edgellm.engine.bindings import KV_TYPE_IDS, ggml, llama, set_fields
from edgellm.engine.embedding import EmbeddingTable
from edgellm.engine.pages import Image, Layout
from edgellm.engine.stateblob import Shape, blank_image, read_image
from edgellm.errors import StageError
from edgellm.types import Mode, Weights

MROPE_TYPES = frozenset((8, 24, 40))
"""Rope types that want four positions a token when the input is embeddings."""


class _Batch:
    """A ``llama_batch`` over numpy arrays, so that filling one costs no Python loop a row."""

    def __init__(self, module: Any, capacity: int, width: int, sections: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.hidden = np.zeros((capacity, width), np.float32) if width else None
        self.positions = np.zeros(capacity * sections, np.int32)
        self.counts = np.ones(capacity, np.int32)
        self.slots = np.zeros(capacity, np.int32)
        self.outputs = np.zeros(capacity, np.int8)
        self.sections = sections
        base = self.slots.ctypes.data
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._slot_pointers = (pointer * capacity)(
            *(ctypes.cast(base + 4 * i, pointer) for i in range(capacity))
        )
        self.native = module.llama_batch()
        set_fields(
            self.native,
            n_tokens=0,
            pos=self.positions.ctypes.data_as(pointer),
            n_seq_id=self.counts.ctypes.data_as(pointer),
            seq_id=self._slot_pointers,
            logits=self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        if self.hidden is not None:
            floats = ctypes.POINTER(ctypes.c_float)
            set_fields(self.native, embd=self.hidden.ctypes.data_as(floats))
        else:
            set_fields(self.native, token=self.tokens.ctypes.data_as(pointer))

    def place(self, rows: Sequence[SlotRow], all_outputs: bool) -> int:
        """Write slots, positions and output flags of ``rows``; returns the number of tokens."""
        total = sum(row.count for row in rows)
        at = 0
        self.outputs[:total] = 1 if all_outputs else 0
        for row in rows:
            end = at + row.count
            self.slots[at:end] = row.slot
            self.positions[at:end] = np.arange(row.position, row.position + row.count)
            if row.output:
                self.outputs[end - 1] = 1
            at = end
        if self.sections == 4:
            # section by section: p, p, p, 0; the sections are as long as the batch, so the text
            # positions just written move into place behind one another
            self.positions[total : 2 * total] = self.positions[:total]
            self.positions[2 * total : 3 * total] = self.positions[:total]
            self.positions[3 * total : 4 * total] = 0
        self.native.n_tokens = total
        return total


class LlamaEngine:
    """See ``base.StageEngine``. Loading takes seconds; raises StageError when llama.cpp refuses."""

    def __init__(self, config: StageConfig) -> None:
        self._llama = llama()
        self._ggml = ggml()
        self._config = config
        settings = config.settings
        self._native_seconds = 0.0
        self._reads: list[Float32] = []
        self._model = self._load_model(config.shard)
        self._width = int(self._llama.llama_model_n_embd(self._model))
        self._input_width = int(self._llama.llama_model_n_embd_inp(self._model))
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self._vocabulary = int(self._llama.llama_vocab_n_tokens(vocabulary))
        self._takes_tokens = config.first and config.last
        self._embedding = (
            EmbeddingTable(config.embedding, self._width, config.embedding_scale)
            if config.first and not config.last
            else None
        )
        self._target = f"{config.residual}-{len(config.span) - 1}".encode()
        self._input_node = b"" if config.first else config.input_node.encode()
        self._watched = frozenset(
            name
            for name, used in ((self._target, not config.last), (self._input_node, True))
            if used and name
        )
        self._written = 0
        self._asked = 0
        self._skip = 0
        self._target_at = 0
        self._found: dict[tuple[int, int], int] = {}
        self._layout: Layout | None = None
        # The context calls this for as long as it lives: the reference must not be lost.
        self._callback = self._llama.ggml_backend_sched_eval_callback(self._on_node)
        self._context = self._open_context()
        self._memory = self._llama.llama_get_memory(self._context)
        sections = 1
        if not self._takes_tokens and self._llama.llama_model_rope_type(self._model) in MROPE_TYPES:
            sections = 4
        self._batch = _Batch(
            self._llama, settings.chunk, 0 if self._takes_tokens else self._input_width, sections
        )

    def _load_model(self, path: str) -> Any:
        parameters = self._llama.llama_model_default_params()
        set_fields(
            parameters,
            n_gpu_layers=0,
            # Without mmap: mapped pages would stay resident beside the repacked copies.
            load_mode=self._llama.LLAMA_LOAD_MODE_NONE,
            use_extra_bufts=self._config.settings.weights is not Weights.PLAIN,
        )
        model = self._llama.llama_model_load_from_file(path.encode(), parameters)
        if not model:
            raise StageError(f"llama.cpp refused to load the shard of layers {self._span_text()}.")
        return model

    def _open_context(self) -> Any:
        settings = self._config.settings
        unified = settings.mode is Mode.NORMAL
        kv_type = KV_TYPE_IDS[settings.kv_type]
        parameters = self._llama.llama_context_default_params()
        set_fields(
            parameters,
            n_ctx=settings.context * settings.sequences,
            n_batch=settings.chunk,
            n_ubatch=settings.chunk,
            n_seq_max=settings.sequences,
            n_threads=settings.threads,
            n_threads_batch=settings.threads,
            flash_attn_type=1 if settings.flash_attention else 0,
            type_k=kv_type,
            type_v=kv_type,
            swa_full=settings.swa_full,
            kv_unified=unified,
            no_perf=True,
        )
        if self._watched:
            set_fields(parameters, cb_eval=self._callback)
        if self._config.last:
            # One output row a sequence is all that a last stage gives; the default reserves
            # logits for every token of a chunk (131 MB at a vocabulary of 256k).
            set_fields(parameters, n_outputs_max=min(settings.chunk, settings.sequences))
        context = self._llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise StageError(
                f"llama.cpp could not make a context of {settings.context} tokens"
                f" x {settings.sequences} sequences with a {settings.kv_type} KV cache.",
                hint="Use a smaller --ctx or another --kv-type.",
            )
        return context

    def _span_text(self) -> str:
        return f"{self._config.span.first} to {self._config.span.end - 1}"

    @property
    def width(self) -> int:
        return self._width

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    @property
    def joint(self) -> str:
        if self._config.settings.mode is Mode.REFERENCE:
            return "none"
        # llama.cpp regroups rows of unequal sequences there, and the callback sees its order.
        return "equal" if self._has_states else "any"

    @property
    def _has_states(self) -> bool:
        """Whether some layers are recurrent."""
        return bool(
            self._llama.llama_model_is_hybrid(self._model)
            or self._llama.llama_model_is_recurrent(self._model)
        )

    @property
    def native_seconds(self) -> float:
        return self._native_seconds

    def decode(
        self, rows: Sequence[SlotRow], tokens: Int32 | None, hidden: Float32 | None
    ) -> Decoded:
        batch = self._batch
        total = batch.place(rows, all_outputs=not self._config.last)
        if self._takes_tokens and tokens is not None:
            batch.tokens[:total] = tokens
        elif batch.hidden is not None:
            source = self._embedding.rows(tokens) if self._embedding is not None else hidden
            batch.hidden[:total, : self._width] = source
        self._reads.clear()
        self._written = self._asked = 0
        shape = (total, len(rows))
        # Graphs of one shape ask about the same nodes. Looking at every name costs 3 % of a
        # stage's time, so most of those before the target are passed over; were it missed all the
        # same, ``_hidden`` would say so.
        self._skip = 0 if self._input_node else self._found.get(shape, 0) * 7 // 8
        started = time.perf_counter()
        status = self._llama.llama_decode(self._context, batch.native)
        self._native_seconds += time.perf_counter() - started
        if status != 0:
            raise StageError(self._decode_reason(status, total))
        if self._config.last:
            return Decoded(hidden=None, logits=self._logits(rows))
        self._found[shape] = self._target_at
        return Decoded(hidden=self._hidden(total), logits=None)

    def _decode_reason(self, status: int, total: int) -> str:
        if status == 1:
            return (
                f"the KV cache has no room for {total} more tokens"
                f" (context {self._config.settings.context})."
            )
        return f"llama_decode failed with status {status} on {total} tokens."

    def _logits(self, rows: Sequence[SlotRow]) -> Float32:
        wanted = sum(row.output for row in rows)
        if not wanted:
            return np.empty((0, self._vocabulary), np.float32)
        address = ctypes.addressof(self._llama.llama_get_logits(self._context).contents)
        size = wanted * self._vocabulary
        # Not ctypeslib.as_array: that takes ten times as long, and this is done for every token.
        memory: Any = (ctypes.c_float * size).from_address(address)
        return np.frombuffer(memory, np.float32, size).reshape(wanted, self._vocabulary)

    def _hidden(self, total: int) -> Float32:
        reads = self._reads
        seen = sum(len(read) for read in reads)
        if seen != total:
            raise StageError(
                f"the engine gave {seen} hidden rows for {total} tokens"
                f" (node {self._target.decode()} of layers {self._span_text()})."
            )
        return reads[0] if len(reads) == 1 else np.concatenate(reads)

    def _on_node(self, tensor: int, ask: bool, _user_data: int | None) -> bool:
        """llama.cpp's ``cb_eval``: called for every node, some hundred times a token.

        Access goes through the backend, since the tensor need not lie in host memory.
        """
        if ask:
            self._asked += 1
            if self._asked < self._skip:
                return False
            return self._ggml.ggml_get_name(tensor) in self._watched
        name = self._ggml.ggml_get_name(tensor)
        count = int(self._ggml.ggml_nelements(tensor)) // self._width
        if name == self._input_node and self._batch.hidden is not None:
            # llama.cpp changed the rows on their way in (a scale meant for token embeddings);
            # put back what the stage before us sent.
            rows = self._batch.hidden[self._written : self._written + count, : self._width]
            rows = np.ascontiguousarray(rows)
            self._ggml.ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)
            self._written += count
            return True
        rows = np.empty((count, self._width), np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
        self._reads.append(rows)
        self._target_at, self._asked = self._asked, 0  # another graph may follow in this call
        return False  # ends the graph: no final norm, no head

    def clear(self, slot: int) -> None:
        self._llama.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def truncate(self, slot: int, position: int) -> None:
        memory = self._memory
        if self._llama.llama_memory_seq_pos_max(memory, slot) < position:
            return
        if not self._has_states:
            window = int(self._llama.llama_model_n_swa(self._model))
            needed = max(0, position + 1 - window) if window else 0
            if self._llama.llama_memory_seq_pos_min(memory, slot) > needed:
                raise StageError(
                    f"the sliding window before position {position} is no longer in memory."
                )
        if not self._llama.llama_memory_seq_rm(memory, slot, position, -1):
            raise StageError(
                f"a model with recurrent layers cannot go back to an earlier position ({position})."
            )

    def export(self, slot: int, tokens: int) -> Image:
        size = int(self._llama.llama_state_seq_get_size(self._context, slot))
        try:
            data = np.empty(size, np.uint8)
        except MemoryError as error:
            raise StageError(f"no memory for {size} bytes of KV pages.") from error
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = self._llama.llama_state_seq_get_data(self._context, pointer, size, slot)
        if not size or written != size:
            raise StageError(f"llama.cpp gave {written} of {size} bytes of a sequence's memory.")
        image = read_image(data, self._shapes(), tokens)
        self._layout = image.layout
        return image

    def _shapes(self) -> list[Shape]:
        """What the memory of this model may look like; ``read_image`` finds out which it is."""
        settings = self._config.settings
        streams = 1 if settings.mode is Mode.NORMAL else settings.sequences
        window = int(self._llama.llama_model_n_swa(self._model))
        if self._llama.llama_model_is_recurrent(self._model):
            return [Shape(0, True, streams, 0)]
        planar = self._llama.llama_model_rope_type(self._model) in MROPE_TYPES
        return [
            Shape(caches, self._has_states, streams, window, planar, values)
            for values in (True, False)
            for caches in ((2, 1) if window else (1,))
        ]

    def blank(self, slot: int, tokens: int) -> Image:
        if self._layout is None:
            # Nobody tells a layout but llama.cpp itself, and it only of a sequence with a token.
            before = self._native_seconds
            row = [SlotRow(slot, 0, 1, False)]
            try:
                if self._config.first:
                    self.decode(row, np.zeros(1, np.int32), None)
                else:
                    self.decode(row, None, np.zeros((1, self._width), np.float32))
                self.export(slot, 1)
            finally:
                self.clear(slot)
                self._native_seconds = before
        if self._layout is None:
            raise StageError("the KV memory of this model cannot be moved.")
        return blank_image(self._layout, tokens)

    def restore(self, slot: int, image: Image) -> None:
        size = image.data.nbytes
        pointer = image.data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        taken = self._llama.llama_state_seq_set_data(self._context, pointer, size, slot)
        newest = self._llama.llama_memory_seq_pos_max(self._memory, slot)
        if taken != size or newest != image.tokens - 1:
            self.clear(slot)
            raise StageError(
                f"llama.cpp took {taken} of {size} bytes of a sequence's memory"
                f" (up to position {newest})."
            )

    def close(self) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
        if self._embedding is not None:
            self._embedding.close()
