"""A model of TinyLlama-1.1B's shape with random weights, for benches without a download.

2048 wide, 22 layers, 32 heads, 4 of them KV, feed-forward 5632, 32,000 tokens, Q4_K_M. It needs
the ``gguf`` package (extra ``dev``) and llama.cpp's quantiser, runs for about 90 s, and is kept in
the user's cache.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgellm.bench.cachefolder import bench_cache
from edgellm.engine.bindings import llama
from edgellm.errors import DeviceError, UsageError

WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 2048, 22, 32, 4, 5632, 32000
HEAD_SIZE = WIDTH // HEADS
NAME = "tinyllama-shape-q4_k_m.gguf"
_NORMAL, _CONTROL, _BYTE = 1, 3, 6


def cached_model(tell: Callable[[str], None]) -> Path:
    """The path of the synthetic model, made if it is not there yet."""
    path = bench_cache() / NAME
    if not path.exists():
        tell(f"Making a synthetic model of TinyLlama's shape at {path} (about 90 s) ...")
        make(path)
    return path


def make(path: Path) -> None:
    """Write the model to ``path``; whole or not at all. Raises UsageError without ``gguf``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, aside = path.with_suffix(".f16"), path.with_suffix(".partial")
    try:
        _write_f16(plain)
        lib = llama()
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_K_M
        parameters.nthread = os.cpu_count() or 1
        status = lib.llama_model_quantize(
            os.fsencode(plain), os.fsencode(aside), ctypes.byref(parameters)
        )
        if status != 0:
            raise DeviceError(f"llama.cpp could not quantise the synthetic model ({status}).")
        aside.replace(path)
    finally:
        plain.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)


def _write_f16(path: Path) -> None:
    try:
        import gguf  # noqa: PLC0415 - only benches need it
    except ModuleNotFoundError as error:
        raise UsageError(
            "making the bench model needs the gguf package.", hint="pip install 'edgellm[dev]'"
        ) from error
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(1)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [_CONTROL] * 3 + [_BYTE] * 256
    words += [f"\u2581w{number}" for number in range(VOCABULARY - len(words))]
    kinds += [_NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(number) for number in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)

    def random(name: str, *shape: int, deviation: float = 0.0) -> None:
        scale = deviation or shape[-1] ** -0.5
        values = generator.standard_normal(shape, dtype=np.float32) * scale
        writer.add_tensor(name, values.astype(np.float16))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))

    random("token_embd.weight", VOCABULARY, WIDTH, deviation=0.02)
    random("output.weight", VOCABULARY, WIDTH)
    ones("output_norm.weight")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        ones(block + "attn_norm.weight")
        ones(block + "ffn_norm.weight")
        random(block + "attn_q.weight", WIDTH, WIDTH)
        random(block + "attn_k.weight", HEAD_SIZE * KV_HEADS, WIDTH)
        random(block + "attn_v.weight", HEAD_SIZE * KV_HEADS, WIDTH)
        random(block + "attn_output.weight", WIDTH, WIDTH)
        random(block + "ffn_gate.weight", FEED_FORWARD, WIDTH)
        random(block + "ffn_up.weight", FEED_FORWARD, WIDTH)
        random(block + "ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
