"""The yardstick: the whole model on plain llama.cpp, in a process of its own.

Run as ``python -m edgellm.bench.whole``. It shares nothing with the engine but the bindings:
tokens in, logits out, no callbacks, llama.cpp's usual chunk of 512, weights loaded as the stages
load theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.engine.bindings import llama, set_fields
from edgellm.engine.childmessages import Answer, answer_calls
from edgellm.engine.childside import open_channel
from edgellm.errors import StageError


class WholeModel:
    """One context of one sequence."""

    def __init__(self, path: str, context: int, threads: int, chunk: int) -> None:
        lib = self._llama = llama()
        model_parameters = lib.llama_model_default_params()
        set_fields(model_parameters, n_gpu_layers=0, load_mode=lib.LLAMA_LOAD_MODE_NONE)
        self._model = lib.llama_model_load_from_file(os.fsencode(path), model_parameters)
        if not self._model:
            raise StageError("llama.cpp refused to load the model.")
        parameters = lib.llama_context_default_params()
        set_fields(
            parameters,
            n_ctx=context,
            n_batch=chunk,
            n_ubatch=chunk,
            n_seq_max=1,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=1,
            no_perf=True,
        )
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise StageError("llama.cpp could not make a context.")
        self._chunk = chunk
        self._vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self._batch = lib.llama_batch_init(chunk, 0, 1)

    def run(self, request: Mapping[str, Any]) -> Answer:
        """Prefill ``prompt`` token ids, then make ``count`` tokens greedily."""
        prompt: list[int] = request["prompt"]
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        started = time.perf_counter()
        for at in range(0, len(prompt), self._chunk):
            part = prompt[at : at + self._chunk]
            self._decode(part, at, last=at + len(part) == len(prompt))
        token = self._best()
        first = time.perf_counter()
        count = int(request["count"])
        for position in range(len(prompt), len(prompt) + count - 1):
            self._decode([token], position, last=True)
            token = self._best()
        ended = time.perf_counter()
        tpot = (ended - first) / (count - 1) if count > 1 else 0.0
        return {"ttft_s": first - started, "tpot_s": tpot}

    def _decode(self, tokens: list[int], position: int, *, last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = int(last and index == len(tokens) - 1)
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise StageError(f"llama_decode failed with status {status}.")

    def _best(self) -> int:
        pointer = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(pointer, (self._vocabulary,))))


def main() -> None:
    channel = open_channel()
    model: WholeModel | None = None

    def load(request: Mapping[str, Any]) -> Answer:
        nonlocal model
        if request["pin"]:
            os.sched_setaffinity(0, request["pin"])
        model = WholeModel(
            request["path"], request["context"], request["threads"], request["chunk"]
        )
        return {}

    def run(request: Mapping[str, Any]) -> Answer:
        if model is None:
            raise StageError("the model is not loaded.")
        return model.run(request)

    answer_calls(channel, {"load": load, "run": run})


if __name__ == "__main__":
    main()
