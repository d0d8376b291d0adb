"""A llama of head size 64 in every quantisation, made by llama.cpp's own quantizer.

``write_wide_llama`` writes it in float32 with the ``gguf`` package; ``quantise`` has a child
process (this file, as a program) make the others of it, because llama.cpp aborts on what it does
not like. The width is 256, the block of the K quantisations: narrower rows would silently get
another type.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellm.engine.childside import import_llama_bindings, set_fields
from edgellm.modelfile.gguf import read_header
from tests.tinymodels import VOCABULARY, write_vocabulary

WIDTH = 256
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 64
FEED_FORWARD = 512
LAYERS = 4
CONTEXT = 256
"""Tokens that it is said to be trained for."""
QUANTISATIONS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "F16", "BF16")
WEIGHTED = ("IQ1_M", "IQ1_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_XS", "IQ3_XXS", "Q2_K_S")
"""Those that want to be told how much each column matters; here all do alike."""
OTHERS = (
    *("IQ3_M", "IQ3_S", "IQ4_NL", "MXFP4_MOE", "Q1_0", "Q2_0", "Q2_K", "Q3_K_L", "Q3_K_M"),
    *("Q3_K_S", "Q4_1", "Q4_K_S", "Q5_0", "Q5_1", "Q5_K_S", "TQ1_0", "TQ2_0"),
)
"""Everything else that llama.cpp's quantizer makes."""


def write_wide_llama(folder: Path, *, tied: bool = False, experts: int = 0) -> Path:
    """The float32 model; the same bytes every time. ``experts``: so many in each layer, 2 used."""
    path = folder / f"wide{'-tied' if tied else ''}{f'-{experts}' if experts else ''}.gguf"
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("wide llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    write_vocabulary(writer)

    def normal(name: str, *shape: int) -> None:
        # Large enough for earlier tokens to matter, small enough for attention not to saturate.
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        writer.add_tensor(f"{name}.weight", values)

    def norm(name: str) -> None:
        values = 1 + random.standard_normal(WIDTH, dtype=np.float32) * np.float32(0.1)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    normal("token_embd", VOCABULARY, WIDTH)
    if not tied:
        normal("output", VOCABULARY, WIDTH)
    norm("output_norm")
    for layer in range(LAYERS):
        p = f"blk.{layer}"
        norm(f"{p}.attn_norm")
        norm(f"{p}.ffn_norm")
        normal(f"{p}.attn_q", HEADS * HEAD_SIZE, WIDTH)
        normal(f"{p}.attn_k", KV_HEADS * HEAD_SIZE, WIDTH)
        normal(f"{p}.attn_v", KV_HEADS * HEAD_SIZE, WIDTH)
        normal(f"{p}.attn_output", WIDTH, HEADS * HEAD_SIZE)
        if experts:
            normal(f"{p}.ffn_gate_inp", experts, WIDTH)
            normal(f"{p}.ffn_gate_exps", experts, FEED_FORWARD, WIDTH)
            normal(f"{p}.ffn_up_exps", experts, FEED_FORWARD, WIDTH)
            normal(f"{p}.ffn_down_exps", experts, WIDTH, FEED_FORWARD)
        else:
            normal(f"{p}.ffn_gate", FEED_FORWARD, WIDTH)
            normal(f"{p}.ffn_up", FEED_FORWARD, WIDTH)
            normal(f"{p}.ffn_down", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantise(source: Path, folder: Path, kinds: Sequence[str] = QUANTISATIONS) -> dict[str, Path]:
    """``source`` in all ``kinds``, by their names; the files are made by one child process."""
    made = {kind: folder / f"{source.stem}-{kind.lower()}.gguf" for kind in kinds}
    missing = [kind for kind in kinds if not made[kind].exists()]
    if missing:
        command = [sys.executable, "-m", "tests.quantised", str(source)]
        command += [f"{kind}={made[kind]}" for kind in missing]
        root = Path(__file__).resolve().parent.parent
        subprocess.run(command, check=True, capture_output=True, cwd=root, timeout=60)
    return made


def _importance(llama: Any, source: Path) -> Any:
    """A matrix in which all columns of all tensors count alike, as llama.cpp takes it."""
    infos = [info for info in read_header(source).tensors if len(info.shape) == 2]
    entries = (llama.llama_model_imatrix_data * (len(infos) + 1))()  # the last one has no name
    ones = ctypes.c_float * max(info.shape[0] for info in infos)
    for entry, info in zip(entries, infos, strict=False):
        data = ones(*[1.0] * info.shape[0])
        set_fields(
            entry,
            name=info.name.encode(),
            data=ctypes.cast(data, ctypes.POINTER(ctypes.c_float)),
            size=info.shape[0],
        )
    return entries


def main() -> None:
    llama = import_llama_bindings()
    source, *wanted = sys.argv[1:]
    importance = _importance(llama, Path(source))
    for item in wanted:
        kind, _, path = item.partition("=")
        parameters = llama.llama_model_quantize_default_params()
        set_fields(parameters, ftype=getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), nthread=1)
        if kind in WEIGHTED:
            set_fields(parameters, imatrix=importance)
        status = llama.llama_model_quantize(
            source.encode(), path.encode(), ctypes.byref(parameters)
        )
        if status != 0:
            raise SystemExit(f"{kind}: status {status}")


if __name__ == "__main__":
    main()
