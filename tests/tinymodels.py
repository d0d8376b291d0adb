"""Tiny random-weight models of many architectures, made offline in milliseconds.

This file may use the ``gguf`` package and numpy, and nothing of edgellm: the reader and the
cutter are tested on files that another writer made. The weights are large (standard deviation
0.3) so that earlier tokens change later logits: with llama.cpp's own tiny weights a permuted
context goes unnoticed. All have a byte-level SentencePiece vocabulary and float32 weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

VOCABULARY = 288
WIDTH = 64
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 32
FEED_FORWARD = 96
EXPERTS = 4
EXPERTS_USED = 2
EXPERT_FEED_FORWARD = 32
CONTEXT = 512
DEVIATION = 0.3


@dataclass
class Build:
    """One model in the making: the writer, a random source, and shorthands for both."""

    writer: gguf.GGUFWriter
    random: np.random.Generator
    layers: int
    head_size: int = HEAD_SIZE

    def normal(self, name: str, *shape: int) -> None:
        """A random tensor; ``shape`` in numpy's order (rows first)."""
        values = self.random.standard_normal(shape, dtype=np.float32) * np.float32(DEVIATION)
        self.writer.add_tensor(name, values)

    def norm(self, name: str, size: int) -> None:
        """A norm's weight: near one, so that a lost or swapped norm shows."""
        values = 1 + self.random.standard_normal(size, dtype=np.float32) * np.float32(0.1)
        self.writer.add_tensor(name, values.astype(np.float32))

    def decay(self, name: str, *shape: int) -> None:
        """Negative numbers, so that a recurrent state fades instead of exploding."""
        values = -np.abs(self.random.standard_normal(shape, dtype=np.float32)) - np.float32(0.1)
        self.writer.add_tensor(name, values)

    def integer(self, suffix: str, value: int) -> None:
        self.writer.add_uint32(f"{self.writer.arch}.{suffix}", value)

    def number(self, suffix: str, value: float) -> None:
        self.writer.add_float32(f"{self.writer.arch}.{suffix}", value)

    def attention(self, p: str, *, bias: bool = False, qk_norm: bool = False) -> None:
        q, kv = HEADS * self.head_size, KV_HEADS * self.head_size
        self.normal(f"{p}.attn_q.weight", q, WIDTH)
        self.normal(f"{p}.attn_k.weight", kv, WIDTH)
        self.normal(f"{p}.attn_v.weight", kv, WIDTH)
        self.normal(f"{p}.attn_output.weight", WIDTH, q)
        if bias:
            self.normal(f"{p}.attn_q.bias", q)
            self.normal(f"{p}.attn_k.bias", kv)
            self.normal(f"{p}.attn_v.bias", kv)
        if qk_norm:
            self.norm(f"{p}.attn_q_norm.weight", self.head_size)
            self.norm(f"{p}.attn_k_norm.weight", self.head_size)

    def dense(self, p: str) -> None:
        self.normal(f"{p}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        self.normal(f"{p}.ffn_up.weight", FEED_FORWARD, WIDTH)
        self.normal(f"{p}.ffn_down.weight", WIDTH, FEED_FORWARD)

    def experts(self, p: str, width: int) -> None:
        self.normal(f"{p}.ffn_gate_inp.weight", EXPERTS, WIDTH)
        self.normal(f"{p}.ffn_gate_exps.weight", EXPERTS, width, WIDTH)
        self.normal(f"{p}.ffn_up_exps.weight", EXPERTS, width, WIDTH)
        self.normal(f"{p}.ffn_down_exps.weight", EXPERTS, WIDTH, width)

    def norms(self, p: str, *names: str) -> None:
        for name in names:
            self.norm(f"{p}.{name}.weight", WIDTH)


def write_vocabulary(writer: gguf.GGUFWriter) -> None:
    """SentencePiece with all bytes, the space and the small letters: any text has tokens."""
    pieces: list[tuple[str, float, int]] = [
        ("<unk>", 0.0, gguf.TokenType.UNKNOWN),
        ("<s>", 0.0, gguf.TokenType.CONTROL),
        ("</s>", 0.0, gguf.TokenType.CONTROL),
    ]
    pieces += [(f"<0x{byte:02X}>", 0.0, gguf.TokenType.BYTE) for byte in range(256)]
    letters = "\u2581abcdefghijklmnopqrstuvwxyz.,"
    pieces += [(c, -float(i + 1), gguf.TokenType.NORMAL) for i, c in enumerate(letters)]
    if len(pieces) != VOCABULARY:
        raise ValueError(f"the vocabulary has {len(pieces)} pieces, not {VOCABULARY}")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([int(kind) for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def common(b: Build, *, head: bool = True) -> None:
    w = b.writer
    w.add_name("tiny model")  # not the architecture: llama.cpp reads meaning into "phi3"
    w.add_context_length(CONTEXT)
    w.add_embedding_length(WIDTH)
    w.add_block_count(b.layers)
    w.add_feed_forward_length(FEED_FORWARD)
    w.add_head_count(HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_key_length(b.head_size)
    w.add_value_length(b.head_size)
    w.add_vocab_size(VOCABULARY)
    write_vocabulary(w)
    b.normal("token_embd.weight", VOCABULARY, WIDTH)
    if head:
        b.normal("output.weight", VOCABULARY, WIDTH)


def _llama(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_rope_dimension_count(b.head_size)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}")
        b.dense(f"blk.{i}")


def _llama_tied(b: Build) -> None:
    """Tied head, and rotary factors, which llama.cpp keeps once a model."""
    common(b, head=False)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_rope_dimension_count(b.head_size)
    factors = np.linspace(1.0, 4.0, b.head_size // 2, dtype=np.float32)
    b.writer.add_tensor("rope_freqs.weight", factors)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}")
        b.dense(f"blk.{i}")


def _llama_moe(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_rope_dimension_count(b.head_size)
    b.writer.add_expert_count(EXPERTS)
    b.writer.add_expert_used_count(EXPERTS_USED)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}")
        b.experts(f"blk.{i}", FEED_FORWARD)


def _qwen2(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(KV_HEADS)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}", bias=True)
        b.dense(f"blk.{i}")


def _qwen3(b: Build) -> None:
    common(b, head=False)
    b.writer.add_head_count_kv(KV_HEADS)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}", qk_norm=True)
        b.dense(f"blk.{i}")


def _qwen3moe(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_expert_count(EXPERTS)
    b.writer.add_expert_used_count(EXPERTS_USED)
    b.writer.add_expert_feed_forward_length(EXPERT_FEED_FORWARD)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}", qk_norm=True)
        b.experts(f"blk.{i}", EXPERT_FEED_FORWARD)


def _gemma(b: Build, *, qk_norm: bool, window: int) -> None:
    common(b, head=False)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_sliding_window(window)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        p = f"blk.{i}"
        b.norms(p, "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
        b.attention(p, qk_norm=qk_norm)
        b.dense(p)


def _gemma2(b: Build) -> None:
    _gemma(b, qk_norm=False, window=8)
    b.number("attn_logit_softcapping", 50.0)
    b.number("final_logit_softcapping", 30.0)


def _gemma3(b: Build) -> None:
    _gemma(b, qk_norm=True, window=8)
    b.number("rope.freq_base", 1_000_000.0)


def _phi3(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(HEADS)
    b.writer.add_rope_dimension_count(b.head_size)
    b.writer.add_rope_scaling_orig_ctx_len(CONTEXT)
    factors = np.linspace(1.0, 2.0, b.head_size // 2, dtype=np.float32)
    b.writer.add_tensor("rope_factors_long.weight", factors * 2)
    b.writer.add_tensor("rope_factors_short.weight", factors)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        p = f"blk.{i}"
        b.norms(p, "attn_norm", "ffn_norm")
        b.normal(f"{p}.attn_qkv.weight", 3 * WIDTH, WIDTH)
        b.normal(f"{p}.attn_output.weight", WIDTH, WIDTH)
        b.normal(f"{p}.ffn_up.weight", 2 * FEED_FORWARD, WIDTH)
        b.normal(f"{p}.ffn_down.weight", WIDTH, FEED_FORWARD)


def _lfm2(b: Build) -> None:
    """Short convolutions and attention: layers 1, 3 and 5 of every six attend."""
    common(b, head=False)
    attends = [i % 2 == 1 for i in range(b.layers)]
    b.writer.add_head_count_kv([KV_HEADS if flag else 0 for flag in attends])
    b.integer("shortconv.l_cache", 3)
    b.norm("token_embd_norm.weight", WIDTH)
    for i, flag in enumerate(attends):
        p = f"blk.{i}"
        b.norms(p, "attn_norm", "ffn_norm")
        b.dense(p)
        if flag:
            b.attention(p, qk_norm=True)
        else:
            b.normal(f"{p}.shortconv.conv.weight", WIDTH, 3)
            b.normal(f"{p}.shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            b.normal(f"{p}.shortconv.out_proj.weight", WIDTH, WIDTH)


def _gemma1(b: Build) -> None:
    common(b, head=False)
    b.writer.add_head_count_kv(KV_HEADS)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm", "ffn_norm")
        b.attention(f"blk.{i}")
        b.dense(f"blk.{i}")


def _granite(b: Build) -> None:
    """A scale in front of everything; llama.cpp takes each from the metadata."""
    _llama(b)
    b.number("embedding_scale", 3.0)
    b.number("residual_scale", 0.7)
    b.number("logit_scale", 2.0)
    b.number("attention.scale", 0.2)


def _olmo2(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_sliding_window(8)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        p = f"blk.{i}"
        b.norms(p, "post_attention_norm", "post_ffw_norm")
        b.attention(p)
        b.norm(f"{p}.attn_q_norm.weight", HEADS * b.head_size)
        b.norm(f"{p}.attn_k_norm.weight", KV_HEADS * b.head_size)
        b.dense(p)


def _cohere2(b: Build) -> None:
    common(b, head=False)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_sliding_window(8)
    b.writer.add_layer_norm_eps(1e-5)
    b.number("logit_scale", 0.5)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        b.norms(f"blk.{i}", "attn_norm")
        b.attention(f"blk.{i}")
        b.dense(f"blk.{i}")


def _gpt_oss(b: Build) -> None:
    common(b)
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_sliding_window(8)
    b.writer.add_rope_dimension_count(b.head_size)
    b.writer.add_expert_count(EXPERTS)
    b.writer.add_expert_used_count(EXPERTS_USED)
    b.writer.add_expert_feed_forward_length(EXPERT_FEED_FORWARD)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        p = f"blk.{i}"
        b.norms(p, "attn_norm", "post_attention_norm")
        b.attention(p, bias=True)
        b.normal(f"{p}.attn_output.bias", WIDTH)
        b.normal(f"{p}.attn_sinks.weight", HEADS)
        b.experts(p, EXPERT_FEED_FORWARD)
        b.normal(f"{p}.ffn_gate_inp.bias", EXPERTS)
        b.normal(f"{p}.ffn_gate_exps.bias", EXPERTS, EXPERT_FEED_FORWARD)
        b.normal(f"{p}.ffn_up_exps.bias", EXPERTS, EXPERT_FEED_FORWARD)
        b.normal(f"{p}.ffn_down_exps.bias", EXPERTS, WIDTH)


def _mamba(b: Build) -> None:
    """No attention at all: every layer carries a recurrent state."""
    common(b)
    inner, kernel, state, rank = 2 * WIDTH, 4, 16, 8
    for suffix, value in (
        ("ssm.conv_kernel", kernel),
        ("ssm.inner_size", inner),
        ("ssm.state_size", state),
        ("ssm.time_step_rank", rank),
    ):
        b.integer(suffix, value)
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        p = f"blk.{i}"
        b.norms(p, "attn_norm")
        b.normal(f"{p}.ssm_in.weight", 2 * inner, WIDTH)
        b.normal(f"{p}.ssm_conv1d.weight", inner, kernel)
        b.normal(f"{p}.ssm_conv1d.bias", inner)
        b.normal(f"{p}.ssm_x.weight", rank + 2 * state, inner)
        b.normal(f"{p}.ssm_dt.weight", inner, rank)
        b.normal(f"{p}.ssm_dt.bias", inner)
        b.decay(f"{p}.ssm_a", inner, state)
        b.normal(f"{p}.ssm_d", inner)
        b.normal(f"{p}.ssm_out.weight", WIDTH, inner)


def _qwen35(b: Build) -> None:
    """Gated delta nets, every second layer attention, and four rotary sections (M-RoPE)."""
    common(b)
    kernel, state, value_heads, key_heads = 4, 32, 4, 2
    b.writer.add_head_count_kv(KV_HEADS)
    b.writer.add_array(f"{b.writer.arch}.rope.dimension_sections", [4, 6, 6, 0])
    for suffix, value in (
        ("full_attention_interval", 2),
        ("ssm.conv_kernel", kernel),
        ("ssm.inner_size", state * value_heads),
        ("ssm.state_size", state),
        ("ssm.time_step_rank", value_heads),
        ("ssm.group_count", key_heads),
    ):
        b.integer(suffix, value)
    values, keys = state * value_heads, state * key_heads
    b.norm("output_norm.weight", WIDTH)
    for i in range(b.layers):
        p = f"blk.{i}"
        b.norms(p, "attn_norm", "post_attention_norm")
        b.dense(p)
        if (i + 1) % 2 == 0:
            b.normal(f"{p}.attn_q.weight", 2 * HEADS * b.head_size, WIDTH)
            b.normal(f"{p}.attn_k.weight", KV_HEADS * b.head_size, WIDTH)
            b.normal(f"{p}.attn_v.weight", KV_HEADS * b.head_size, WIDTH)
            b.normal(f"{p}.attn_output.weight", WIDTH, HEADS * b.head_size)
            b.norm(f"{p}.attn_q_norm.weight", b.head_size)
            b.norm(f"{p}.attn_k_norm.weight", b.head_size)
            continue
        b.normal(f"{p}.attn_qkv.weight", 2 * keys + values, WIDTH)
        b.normal(f"{p}.attn_gate.weight", values, WIDTH)
        b.normal(f"{p}.ssm_conv1d.weight", 2 * keys + values, kernel)
        b.normal(f"{p}.ssm_dt.bias", value_heads)
        b.decay(f"{p}.ssm_a", value_heads)
        b.normal(f"{p}.ssm_beta.weight", value_heads, WIDTH)
        b.normal(f"{p}.ssm_alpha.weight", value_heads, WIDTH)
        b.norm(f"{p}.ssm_norm.weight", state)
        b.normal(f"{p}.ssm_out.weight", WIDTH, values)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A recipe for one tiny model."""

    name: str
    architecture: str
    layers: int
    build: Callable[[Build], None]
    head_size: int = HEAD_SIZE


TINY_MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in (
        TinyModel("llama", "llama", 5, _llama),
        TinyModel("llama-head64", "llama", 4, _llama, head_size=64),
        TinyModel("llama-tied", "llama", 4, _llama_tied),
        TinyModel("llama-moe", "llama", 4, _llama_moe),
        TinyModel("mistral3", "mistral3", 4, _llama),
        TinyModel("qwen2", "qwen2", 4, _qwen2, head_size=WIDTH // HEADS),
        TinyModel("qwen3", "qwen3", 4, _qwen3),
        TinyModel("qwen3moe", "qwen3moe", 4, _qwen3moe),
        TinyModel("gemma2", "gemma2", 5, _gemma2),
        TinyModel("gemma3", "gemma3", 13, _gemma3),
        TinyModel("gemma", "gemma", 4, _gemma1),
        TinyModel("granite", "granite", 4, _granite),
        TinyModel("minicpm", "minicpm", 4, _llama),
        TinyModel("olmo2", "olmo2", 9, _olmo2, head_size=WIDTH // HEADS),
        TinyModel("cohere2", "cohere2", 9, _cohere2, head_size=WIDTH // HEADS),
        TinyModel("gpt-oss", "gpt-oss", 5, _gpt_oss),
        TinyModel("mamba", "mamba", 4, _mamba),
        TinyModel("qwen35", "qwen35", 6, _qwen35),
        TinyModel("phi3", "phi3", 4, _phi3, head_size=WIDTH // HEADS),
        TinyModel("lfm2", "lfm2", 6, _lfm2, head_size=WIDTH // HEADS),
    )
}


def write_tiny_model(name: str, directory: Path, *, layers: int = 0) -> Path:
    """Write the tiny model ``name`` into ``directory``; the same bytes every time.

    ``layers`` is for another number of layers than the usual one.
    """
    return write_recipe(TINY_MODELS[name], directory, layers=layers)


def write_recipe(model: TinyModel, directory: Path, *, layers: int = 0) -> Path:
    """The same for a recipe that is not one of ``TINY_MODELS``."""
    layers = layers or model.layers
    path = directory / f"{model.name}-{layers}.gguf"
    writer = gguf.GGUFWriter(path, model.architecture)
    random = np.random.default_rng(zlib.crc32(model.name.encode("utf-8")))
    model.build(Build(writer, random, layers, model.head_size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
