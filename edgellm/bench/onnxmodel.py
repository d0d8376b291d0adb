"""An ONNX decoder with random weights, as onnxruntime-genai writes them, for benches without a
download: grouped attention, two outputs of each norm, weights in a file beside the graph.

768 wide, 12 layers, 12 heads of 64, 4 of them KV, feed-forward 2304, 8,192 tokens, float32: 390 MB,
a step of some 13 ms on one thread. It needs the ``onnx`` package (extra ``dev``), is made in
seconds and kept in the user's cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.bench.cachefolder import bench_cache
from edgellm.errors import UsageError

WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 768, 12, 12, 4, 2304, 8192
HEAD_SIZE = WIDTH // HEADS
CONTEXT = 2048
NAME = "decoder-768x12-onnx"
_DOMAIN = "com.microsoft"
_EPSILON = 1e-5


def cached_onnx_model(tell: Callable[[str], None]) -> Path:
    """The folder of the synthetic model, made if it is not there yet. Raises UsageError without
    ``onnx``."""
    folder = bench_cache() / NAME
    if not (folder / "model.onnx").exists():
        tell(f"Making a synthetic ONNX model at {folder} ...")
        aside = folder.with_name(f"{NAME}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write_decoder(aside)
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def write_decoder(
    folder: Path,
    *,
    layers: int = LAYERS,
    width: int = WIDTH,
    feed_forward: int = FEED_FORWARD,
    vocabulary: int = VOCABULARY,
) -> Path:
    """Write such a model into ``folder``; the path of its graph. Raises UsageError."""
    try:
        import onnx  # noqa: PLC0415 - only benches need it
    except ModuleNotFoundError as error:
        raise UsageError(
            "making the bench model needs the onnx package.", hint="pip install 'edgellm[dev]'"
        ) from error
    made = _Decoder(onnx, layers, width, feed_forward, vocabulary).model()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="model.onnx.data")
    return path


class _Decoder:
    """Collects the nodes and weights of a graph."""

    def __init__(
        self, onnx: Any, layers: int, width: int, feed_forward: int, vocabulary: int
    ) -> None:
        self._onnx = onnx
        self._layers = layers
        self._width = width
        self._feed_forward = feed_forward
        self._vocabulary = vocabulary
        self._heads = width // HEAD_SIZE
        self._kv_heads = max(1, self._heads * KV_HEADS // HEADS)
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def model(self) -> Any:
        helper = self._onnx.helper
        self._inputs += [self._put("input_ids", np.int64, "batch", "sequence")]
        self._inputs += [self._put("attention_mask", np.int64, "batch", "total")]
        self._outputs += [self._put("logits", np.float32, "batch", "sequence", self._vocabulary)]
        self._body()
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, initializer=self._weights
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(_DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def _put(self, name: str, kind: Any, *dims: object) -> Any:
        element = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        return self._onnx.helper.make_tensor_value_info(name, element, list(dims))

    def _node(
        self, op: str, inputs: list[str], *outputs: str, domain: str = "", **more: Any
    ) -> None:
        made = self._onnx.helper.make_node(op, inputs, list(outputs), domain=domain, **more)
        self._nodes.append(made)

    def _constant(self, name: str, value: Any) -> str:
        self._weights.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def _matrix(self, name: str, rows: int, columns: int) -> str:
        values = self._random.standard_normal((rows, columns), dtype=np.float32)
        return self._constant(name, values / np.float32(np.sqrt(rows)))

    def _scale(self, name: str) -> str:
        return self._constant(name, np.ones(self._width, np.float32))

    def _body(self) -> None:
        angles = np.arange(CONTEXT)[:, None] * 1e4 ** -(
            np.arange(HEAD_SIZE // 2)[None] / (HEAD_SIZE // 2)
        )
        self._constant("cos", np.cos(angles).astype(np.float32))
        self._constant("sin", np.sin(angles).astype(np.float32))
        self._constant("one", np.array([1], np.int64))
        self._constant("at", np.array(1, np.int64))
        self._node("ReduceSum", ["attention_mask", "one"], "count", keepdims=0)
        self._node("Sub", ["count", "one"], "before")
        self._node("Cast", ["before"], "lengths", to=6)
        self._node("Shape", ["attention_mask"], "mask.shape")
        self._node("Gather", ["mask.shape", "at"], "total.long", axis=0)
        self._node("Cast", ["total.long"], "total", to=6)
        table = self._matrix("embedding", self._vocabulary, self._width)
        self._node("Gather", [table, "input_ids"], "embedded")
        self._node(
            "SimplifiedLayerNormalization",
            ["embedded", self._scale("l0.attention.norm")],
            "l0.normed",
            axis=-1,
            epsilon=_EPSILON,
        )
        residual = "embedded"
        for layer in range(self._layers):
            residual = self._layer(layer, residual)
        head = self._matrix("head", self._width, self._vocabulary)
        self._node("MatMul", [f"l{self._layers}.normed", head], "logits")

    def _layer(self, layer: int, residual: str) -> str:
        p, following = f"l{layer}", f"l{layer + 1}"
        dims = ("batch", self._kv_heads, "past", HEAD_SIZE)
        for name in ("key", "value"):
            self._inputs.append(self._put(f"past.{layer}.{name}", np.float32, *dims))
            self._outputs.append(self._put(f"present.{layer}.{name}", np.float32, *dims))
        packed = (self._heads + 2 * self._kv_heads) * HEAD_SIZE
        self._node(
            "MatMul", [f"{p}.normed", self._matrix(f"{p}.qkv", self._width, packed)], f"{p}.all"
        )
        self._node(
            "GroupQueryAttention",
            [
                f"{p}.all", "", "", f"past.{layer}.key", f"past.{layer}.value", "lengths", "total",
                "cos", "sin",
            ],
            f"{p}.picked", f"present.{layer}.key", f"present.{layer}.value",
            domain=_DOMAIN, num_heads=self._heads, kv_num_heads=self._kv_heads, do_rotary=1,
        )  # fmt: skip
        out = self._matrix(f"{p}.out", self._heads * HEAD_SIZE, self._width)
        self._node("MatMul", [f"{p}.picked", out], f"{p}.attended")
        self._skip(residual, f"{p}.attended", f"{p}.feed.norm", f"{p}.fed", f"{p}.middle")
        for name in ("gate", "up"):
            weight = self._matrix(f"{p}.{name}.weight", self._width, self._feed_forward)
            self._node("MatMul", [f"{p}.fed", weight], f"{p}.{name}")
        self._node("Sigmoid", [f"{p}.gate"], f"{p}.sigmoid")
        self._node("Mul", [f"{p}.gate", f"{p}.sigmoid"], f"{p}.silu")
        self._node("Mul", [f"{p}.silu", f"{p}.up"], f"{p}.both")
        down = self._matrix(f"{p}.down.weight", self._feed_forward, self._width)
        self._node("MatMul", [f"{p}.both", down], f"{p}.down")
        scale = f"{following}.attention.norm"
        self._skip(f"{p}.middle", f"{p}.down", scale, f"{following}.normed", f"{p}.sum")
        return f"{p}.sum"

    def _skip(self, residual: str, added: str, scale: str, normed: str, total: str) -> None:
        self._node(
            "SkipSimplifiedLayerNormalization",
            [residual, added, self._scale(scale)],
            normed, "", "", total,
            domain=_DOMAIN, epsilon=_EPSILON,
        )  # fmt: skip
