"""LoRA adapters in a stage: loaded after its model, before its context, which then uses them.

This file runs in a stage process only. The files were validated by ``modelfile.lora``.
"""

from __future__ import annotations

import ctypes
from typing import Any

from edgellm.engine.base import StageConfig
from edgellm.engine.childside import take_llama_error
from edgellm.errors import StageError


def load_adapters(llama: Any, model: Any, config: StageConfig) -> list[Any]:
    """The adapters of ``config``, loaded beside ``model``; they are freed with it.

    Before there is a context: llama.cpp sizes its graphs by what the model has then. Raises
    StageError where it refuses one.
    """
    take_llama_error()
    loaded = []
    for path, _ in config.adapters:
        adapter = llama.llama_adapter_lora_init(model, path.encode())
        if not adapter:
            reason = take_llama_error()
            raise StageError(f"llama.cpp refused an adapter{f': {reason}' if reason else ''}.")
        loaded.append(adapter)
    return loaded


def use_adapters(llama: Any, context: Any, adapters: list[Any], config: StageConfig) -> None:
    """Have ``context`` compute with them, in their order. Raises StageError."""
    if not adapters:
        return
    handles = (llama.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in config.adapters))
    status = llama.llama_set_adapters_lora(context, handles, len(adapters), scales)
    if status != 0:
        raise StageError(f"llama.cpp did not take the adapters (status {status}).")
