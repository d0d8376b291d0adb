"""A GGUF of a few llama layers with random weights: what the probe runs instead of a model.

Its layers have TinyLlama's shape, in the mixture Q4_K_M, the most used one, or in one type. It is
written without llama.cpp's quantiser and without the ``gguf`` package: any bytes make a block of a
quantised type, as long as its scale is a small number. Nothing is measured here.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import DeviceError
from edgellm.modelfile.ggml_types import F32, GGML_TYPES_BY_NAME, GgmlType, ValueType
from edgellm.modelfile.metadata import MetaValue, scalar_value
from edgellm.modelfile.writer import TensorLayout, encode_header, padding

MIXTURE = ("q4_K", "q6_K")
"""Types of the matrices of Q4_K_M: of most, and of those in half of its layers that get better."""
HEAD_SIZE = 64
_CONTEXT = 2048
_PATTERN_BLOCKS = 4096
_MIN_LAYERS, _MAX_LAYERS = 4, 12
_CACHES_FULL = 2.2
"""Weights that are this many times the last-level cache leave next to nothing in it from one step
to the next."""
_FULL_WIDTH, _FULL_FEED_FORWARD = 2048, 5632


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Layers of grouped-query attention (eight heads to one of keys) and a gated feed-forward."""

    width: int
    feed_forward: int
    layers: int
    kinds: tuple[str, str] = MIXTURE
    """Types of most matrices, and of the better ones; the same twice for a single type."""

    @property
    def heads(self) -> int:
        return self.width // HEAD_SIZE

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 8)

    def matrices(self) -> Iterator[TensorLayout]:
        """The quantised tensors, layer by layer: what a step reads."""
        kv = self.kv_heads * HEAD_SIZE
        usual, better_kind = (GGML_TYPES_BY_NAME[kind] for kind in self.kinds)
        for layer in range(self.layers):
            fine = layer % 2 == self.layers % 2  # the mixture Q4_K_M has about half its layers so
            for name, rows, columns, better in (
                ("attn_q", self.width, self.width, False),
                ("attn_k", kv, self.width, False),
                ("attn_v", kv, self.width, fine),
                ("attn_output", self.width, self.width, False),
                ("ffn_gate", self.feed_forward, self.width, False),
                ("ffn_up", self.feed_forward, self.width, False),
                ("ffn_down", self.width, self.feed_forward, fine),
            ):
                kind = better_kind if better else usual
                nbytes = rows * kind.row_bytes(columns)
                yield TensorLayout(f"blk.{layer}.{name}.weight", (columns, rows), kind, nbytes)

    @property
    def weights(self) -> int:
        """Elements of the matrices."""
        return sum(tensor.shape[0] * tensor.shape[1] for tensor in self.matrices())

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.matrices())


BARE = BlockShape(width=256, feed_forward=256, layers=1)
"""So narrow that a step through it is all overhead."""


ATTENTION = BlockShape(width=2048, feed_forward=256, layers=1)
"""So few weights that a step behind many tokens is mostly attention."""


def shape_of_kind(kind: str, memory_bytes: int, cache_bytes: int = 0) -> BlockShape:
    """The block for a single type: as few layers as leave the cache behind, two at least."""
    one = BlockShape(_FULL_WIDTH, _FULL_FEED_FORWARD, 1, (kind, kind)).weight_bytes
    layers = min(max(2, -int(-_CACHES_FULL * cache_bytes // one)), _MAX_LAYERS)
    room = int(memory_bytes // one)
    if room >= 2:
        return BlockShape(_FULL_WIDTH, _FULL_FEED_FORWARD, min(layers, room), (kind, kind))
    return BlockShape(512, 1536, 2, (kind, kind))


def shape_for(memory_bytes: int, cache_bytes: int = 0) -> BlockShape:
    """The block for a machine that can spare ``memory_bytes`` for weights, read into memory while
    they are also in the system's cache, and whose last-level cache has ``cache_bytes`` (0: not
    known). It exceeds that cache unless memory forbids; a small device gets fewer layers, and a
    very small one narrower ones."""
    one = BlockShape(_FULL_WIDTH, _FULL_FEED_FORWARD, 2).weight_bytes / 2
    layers = min(max(_MIN_LAYERS, -int(-_CACHES_FULL * cache_bytes // one)), _MAX_LAYERS)
    room = int(memory_bytes // one)
    if room >= 2:
        return BlockShape(_FULL_WIDTH, _FULL_FEED_FORWARD, min(layers, room))
    half = BlockShape(_FULL_WIDTH // 2, _FULL_FEED_FORWARD // 2, 2).weight_bytes / 2
    if memory_bytes >= 2 * half:
        return BlockShape(_FULL_WIDTH // 2, _FULL_FEED_FORWARD // 2, int(memory_bytes // half))
    return BlockShape(512, 1536, 2)


def write_block(path: Path, shape: BlockShape, seed: int = 0) -> None:
    """Write the block as a GGUF that loads as a middle stage: no tokenizer, a placeholder for the
    embedding. Raises DeviceError where the disk refuses."""
    generator = np.random.default_rng(seed)
    one_row = (
        TensorLayout("token_embd.weight", (shape.width, 1), F32, 4 * shape.width),
        TensorLayout("output_norm.weight", (shape.width,), F32, 4 * shape.width),
    )
    norms = tuple(
        TensorLayout(f"blk.{layer}.{name}.weight", (shape.width,), F32, 4 * shape.width)
        for layer in range(shape.layers)
        for name in ("attn_norm", "ffn_norm")
    )
    matrices = tuple(shape.matrices())
    kinds = dict.fromkeys(tensor.type for tensor in matrices)
    patterns = {kind: _pattern(kind, generator) for kind in kinds}
    tensors = (*one_row, *norms, *matrices)
    ones = struct.pack("<f", 1.0) * shape.width
    try:
        with path.open("wb") as file:
            file.write(encode_header(_metadata(shape), tensors))
            for tensor in tensors:
                data = ones if tensor.type is F32 else patterns[tensor.type]
                for piece in _repeated(data, tensor.nbytes):
                    file.write(piece)
                file.write(bytes(padding(tensor.nbytes)))
    except OSError as error:
        raise DeviceError(
            f"the probe cannot write {shape.weight_bytes >> 20} MiB to {path.parent}:"
            f" {error.strerror or error}.",
            hint="Check the free space and the permissions of that folder.",
        ) from error


def _repeated(data: bytes, nbytes: int) -> Iterator[memoryview]:
    whole, rest = divmod(nbytes, len(data))
    view = memoryview(data)
    yield from itertools.repeat(view, whole)
    yield view[:rest]


def _metadata(shape: BlockShape) -> dict[str, MetaValue]:
    numbers = {
        "context_length": _CONTEXT,
        "embedding_length": shape.width,
        "block_count": shape.layers,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "rope.dimension_count": HEAD_SIZE,
        "vocab_size": 1,
    }
    return {
        "general.architecture": scalar_value(ValueType.STRING, "llama"),
        "general.file_type": scalar_value(ValueType.UINT32, 15),  # mostly Q4_K_M
        "general.quantization_version": scalar_value(ValueType.UINT32, 2),
        "tokenizer.ggml.model": scalar_value(ValueType.STRING, "none"),
        "llama.attention.layer_norm_rms_epsilon": scalar_value(ValueType.FLOAT32, 1e-5),
        **{f"llama.{k}": scalar_value(ValueType.UINT32, v) for k, v in numbers.items()},
    }


def _pattern(kind: GgmlType, generator: np.random.Generator) -> bytes:
    """Random blocks of a type, whose weights have a deviation of about 0.02 around 0."""
    if kind.name == "f16":
        values = generator.standard_normal(_PATTERN_BLOCKS * 64, np.float32) * 0.02
        return values.astype("<f2").tobytes()
    size = kind.size
    blocks: NDArray[np.uint8] = generator.integers(0, 256, (_PATTERN_BLOCKS, size), np.uint8)
    if kind.name == "q4_K":  # weight = d * scale * q - dmin * min; q to 15, scale and min to 63
        _put(blocks, 0, 7e-5)
        _put(blocks, 2, 7e-5 * 7.5)
    elif kind.name == "q6_K":  # d * scale * (q - 32), with q to 63 and scale to 127 of either sign
        _put(blocks, size - 2, 1.6e-5)
    elif kind.name == "q8_0":  # d * q, with q to 127 of either sign
        _put(blocks, 0, 2.7e-4)
    elif kind.name == "q4_0":  # d * (q - 8), with q to 15
        _put(blocks, 0, 4.3e-3)
    else:
        raise ValueError(f"no block of type {kind.name} can be made")
    return blocks.tobytes()


def _put(blocks: NDArray[np.uint8], at: int, value: float) -> None:
    """Write ``value`` as float16 at byte ``at`` of each block."""
    blocks[:, at : at + 2] = np.frombuffer(struct.pack("<e", value), np.uint8)
