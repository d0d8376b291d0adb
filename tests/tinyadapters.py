"""Small random LoRA adapters for test models, written by the ``gguf`` package.

This file uses nothing of edgellm but its reader of headers, which says what the model looks like.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellm.modelfile.gguf import read_header

RANK = 8
USUAL = (
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
)
"""What is adapted in each layer that has it."""


def write_adapter(
    model: Path,
    path: Path,
    *,
    names: Sequence[str] = USUAL,
    outer: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rank: int = RANK,
    alpha: float | None = 16.0,
    kind: str = "F32",
    strength: float = 0.1,
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """An adapter of the model at ``model``; another ``path`` gives other numbers.

    ``layers``: only of these; ``outer``: tensors that are not a layer's, like ``output``;
    ``metadata``: text values instead of the usual ones, or None to leave a key out.
    """
    random = np.random.default_rng(zlib.crc32(path.name.encode()))
    writer = gguf.GGUFWriter(path, architecture)
    told: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora"}
    for key, value in {**told, **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    quantisation = gguf.GGMLQuantizationType[kind]

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(strength)
        if kind == "F32":
            writer.add_tensor(name, values)
            return
        data = gguf.quants.quantize(values, quantisation)
        writer.add_tensor(name, data, raw_dtype=quantisation)

    for info in read_header(model).tensors:
        parts = info.name.split(".")
        inner = parts[0] == "blk" and parts[2] in names and info.name.endswith(".weight")
        if (inner and (layers is None or int(parts[1]) in layers)) or parts[0] in outer:
            width, height, *experts = info.shape
            if parts[0] == "token_embd":  # its rows are looked up
                add(f"{info.name}.lora_a", height, rank)
                add(f"{info.name}.lora_b", width, rank)
            else:
                add(f"{info.name}.lora_a", *experts, rank, width)
                add(f"{info.name}.lora_b", *experts, height, rank)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
