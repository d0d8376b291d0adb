"""Tiny ONNX decoders with random weights, in the shapes that exporters write. Needs ``onnx``.

``plain``: operators of the ONNX standard, keys and values joined by Concat (optimum's way), with
shapes that all layers take from the first one. ``grouped``: onnxruntime's own operators, two
outputs of each norm (onnxruntime-genai's way), weights in a file beside the graph. ``half``: the
same in float16, where two tensors cross. ``conv``: layers in turn of attention and of a short
convolution with a state of its own. ``experts``: as ``grouped``, with four experts of 4 bits in
each layer, of which a token takes two.

Weights are large enough that earlier tokens matter to the bits of later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tinymodels import VOCABULARY, WIDTH

KINDS = ("onnx-plain", "onnx-grouped", "onnx-half", "onnx-conv", "onnx-experts")
LAYERS = 5
HEAD = 16
FEED_FORWARD = 96
CONTEXT = 128
CONV_STATE = 3
EXPERTS = 4


class _Writer:
    """Collects nodes and weights of one graph."""

    def __init__(
        self, kind: str, width: int, layers: int, feed_forward: int, vocabulary: int
    ) -> None:
        self.onnx: Any = pytest.importorskip("onnx")
        self.kind = kind
        self.width = width
        self.layers = layers
        self.feed_forward = feed_forward
        self.vocabulary = vocabulary
        self.heads = width // HEAD
        self.kv_heads = self.heads // 2
        self.half = kind == "onnx-half"
        self.type = np.float16 if self.half else np.float32
        self.random = np.random.default_rng(len(kind) * 1000 + width)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._last = 0

    def constant(self, name: str, value: object, kind: Any = np.int64) -> str:
        self.weights.append(self.onnx.numpy_helper.from_array(np.array(value, kind), name))
        return name

    def normal(self, name: str, *shape: int, scale: float = 1.0) -> str:
        data = self.random.standard_normal(shape) * scale / np.sqrt(shape[0])
        return self.constant(name, data, self.type)

    def node(
        self, op: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any
    ) -> str:
        self._last += 1
        out = out or f"v{self._last}"
        made = self.onnx.helper.make_node(op, list(inputs), [out], domain=domain, **attributes)
        self.nodes.append(made)
        return out

    def many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> None:
        self.nodes.append(
            self.onnx.helper.make_node(
                op, list(inputs), list(outputs), domain="com.microsoft", **attributes
            )
        )

    def value(self, name: str, kind: Any, *dims: object) -> Any:
        element = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        return self.onnx.helper.make_tensor_value_info(name, element, list(dims))

    def state(self, layer: int, *names: str) -> None:
        for name in names:
            dims = ("batch", self.kv_heads, "past", HEAD)
            self.inputs.append(self.value(f"past.{layer}.{name}", self.type, *dims))
            dims = ("batch", self.kv_heads, "total", HEAD)
            self.outputs.append(self.value(f"present.{layer}.{name}", self.type, *dims))

    def norm(self, x: str, scale: str) -> str:
        return self.node("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=1e-5)

    def feed(self, prefix: str, x: str) -> str:
        gate = self.node("MatMul", x, self.normal(f"{prefix}.gate", self.width, self.feed_forward))
        up = self.node("MatMul", x, self.normal(f"{prefix}.up", self.width, self.feed_forward))
        both = self.node("Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), up)
        return self.node(
            "MatMul", both, self.normal(f"{prefix}.down", self.feed_forward, self.width)
        )

    def experts(self, prefix: str, x: str) -> str:
        """Two of four experts for each token, their weights in 4 bits (``QMoE``)."""
        router = self.normal(f"{prefix}.router", self.width, EXPERTS)
        chances = self.node("MatMul", x, router)
        flat = self.constant(f"{prefix}.flat", [-1, EXPERTS])
        made = [x, self.node("Reshape", chances, flat)]
        for name, rows, columns in (
            ("up", 2 * self.feed_forward, self.width),
            ("down", self.width, self.feed_forward),
        ):
            packed = self.random.integers(0, 256, (EXPERTS, rows, columns // 2))
            made.append(self.constant(f"{prefix}.{name}", packed, np.uint8))
            steps = self.random.uniform(0.5, 1.0, (EXPERTS, rows)) / np.sqrt(20.0 * columns)
            made += [self.constant(f"{prefix}.{name}.scales", steps, self.type), ""]
        self.many(
            "QMoE",
            made,
            [f"{prefix}.mixed"],
            k=2,
            activation_type="swiglu",
            swiglu_fusion=1,
            normalize_routing_weights=1,
            expert_weight_bits=4,
        )
        return f"{prefix}.mixed"

    def scale(self, name: str) -> str:
        return self.constant(name, 1 + 0.2 * self.random.standard_normal(self.width), self.type)

    def save(self, folder: Path, *, external: bool) -> Path:
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes, "tiny", self.inputs, self.outputs, initializer=self.weights
        )
        model = helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", 18),
                helper.make_opsetid("com.microsoft", 1),
            ],
            ir_version=9,
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.onnx"
        beside = {"save_as_external_data": True, "location": "model.onnx.data"} if external else {}
        self.onnx.save(model, str(path), **beside)
        return path


def write_tiny_onnx(
    kind: str,
    folder: Path,
    *,
    width: int = WIDTH,
    layers: int = LAYERS,
    feed_forward: int = FEED_FORWARD,
    vocabulary: int = VOCABULARY,
) -> Path:
    """Write a model of ``KINDS`` into ``folder``; returns the path of its graph."""
    writer = _Writer(kind, width, layers, feed_forward, vocabulary)
    writer.inputs += [
        writer.value("input_ids", np.int64, "batch", "sequence"),
        writer.value("attention_mask", np.int64, "batch", "total"),
    ]
    table = writer.normal("embedding", vocabulary, width, scale=np.sqrt(vocabulary))
    ids = writer.node("Gather", table, "input_ids", out="embedded")
    logits = writer.value("logits", writer.type, "batch", "sequence", vocabulary)
    writer.outputs.append(logits)
    if kind in ("onnx-plain", "onnx-conv"):
        _plain(writer, ids)
    else:
        _grouped(writer, ids)
    return writer.save(folder, external=kind in ("onnx-grouped", "onnx-half"))


def write_tangled_onnx(folder: Path) -> Path:
    """A model of 8 layers that nobody can cut: the end reads something of every layer."""
    onnx: Any = pytest.importorskip("onnx")
    path = write_tiny_onnx("onnx-plain", folder, layers=8)
    model = onnx.load(str(path))
    nodes = list(model.graph.node)
    (end,) = [i for i, n in enumerate(nodes) if n.op_type == "SimplifiedLayerNormalization"][-1:]
    joins = []
    last = nodes[end].input[0]
    for number, node in enumerate([n for n in nodes if n.op_type == "Softmax"]):
        mean, joined = f"mean{number}", f"joined{number}"
        joins.append(onnx.helper.make_node("ReduceMax", [node.output[0]], [mean], keepdims=0))
        joins.append(onnx.helper.make_node("Add", [last, mean], [joined]))
        last = joined
    nodes[end].input[0] = last
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:end], *joins, *nodes[end:]])
    onnx.save(model, str(path))
    return path


def _rotary(size: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(CONTEXT * 8)[:, None] * 100.0 ** (-np.arange(size) / size)[None]
    return np.cos(angles), np.sin(angles)


def _plain(w: _Writer, x: str) -> None:
    w.inputs.append(w.value("position_ids", np.int64, "batch", "sequence"))
    for name, table in zip(("cos", "sin"), _rotary(HEAD // 2), strict=True):
        w.constant(f"{name}.table", np.concatenate([table, table], 1), w.type)
        w.node("Gather", f"{name}.table", "position_ids", out=f"{name}.rows")
        w.node("Unsqueeze", f"{name}.rows", w.constant(f"{name}.axis", [1]), out=name)
    # Shapes of the first layer's tensors, read by all layers: what a later stage has to rebuild.
    shape = w.node("Shape", x)
    batch = w.node("Gather", shape, w.constant("zero", [0]))
    new = w.node("Gather", shape, w.constant("one", [1]))
    past = w.node("Gather", w.node("Shape", "past.0.key"), w.constant("two", [2]))
    total = w.node("Add", past, new)
    rows = w.node("Range", w.node("Squeeze", past), w.node("Squeeze", total), w.constant("step", 1))
    columns = w.node("Range", w.constant("from", 0), w.node("Squeeze", total), "step")
    later = w.node(
        "Greater", w.node("Unsqueeze", columns, "zero"), w.node("Unsqueeze", rows, "one")
    )
    w.constant("hidden", -1e30, w.type)
    mask = w.node("Where", later, "hidden", w.constant("shown", 0.0, w.type))
    for layer in range(w.layers):
        if w.kind == "onnx-conv" and layer % 2:
            x = _convolution(w, layer, x)
        else:
            x = _attention(w, layer, x, mask, batch, new)
        x = w.node("Add", x, w.feed(f"l{layer}", w.norm(x, w.scale(f"l{layer}.ffn"))))
    head = w.normal("head", w.width, w.vocabulary)
    w.node("MatMul", w.norm(x, w.scale("norm")), head, out="logits")


def _attention(w: _Writer, layer: int, x: str, mask: str, batch: str, new: str) -> str:
    p = f"l{layer}"
    w.state(layer, "key", "value")
    normed = w.norm(x, w.scale(f"{p}.attn"))
    found = {}
    for name, heads in (("q", w.heads), ("k", w.kv_heads), ("v", w.kv_heads)):
        y = w.node("MatMul", normed, w.normal(f"{p}.{name}", w.width, heads * HEAD, scale=1.5))
        form = w.node("Concat", batch, new, w.constant(f"{p}.{name}.heads", [heads, HEAD]), axis=0)
        found[name] = w.node("Transpose", w.node("Reshape", y, form), perm=[0, 2, 1, 3])
    for name in ("q", "k"):
        found[name] = _rotated(w, f"{p}.{name}", found[name])
    key = w.node("Concat", f"past.{layer}.key", found["k"], out=f"present.{layer}.key", axis=2)
    value = w.node(
        "Concat", f"past.{layer}.value", found["v"], out=f"present.{layer}.value", axis=2
    )
    group = w.constant(f"{p}.group", [0, w.kv_heads, w.heads // w.kv_heads, -1, HEAD])
    query = w.node("Reshape", found["q"], group)
    wide = w.constant(f"{p}.wide", [2])
    key, value = w.node("Unsqueeze", key, wide), w.node("Unsqueeze", value, wide)
    scores = w.node("MatMul", query, w.node("Transpose", key, perm=[0, 1, 2, 4, 3]))
    scores = w.node("Mul", scores, w.constant(f"{p}.scale", HEAD**-0.5, w.type))
    picked = w.node("MatMul", w.node("Softmax", w.node("Add", scores, mask), axis=-1), value)
    together = w.node("Reshape", picked, w.constant(f"{p}.together", [0, w.heads, -1, HEAD]))
    flat = w.constant(f"{p}.flat", [0, 0, w.heads * HEAD])
    together = w.node("Reshape", w.node("Transpose", together, perm=[0, 2, 1, 3]), flat)
    return w.node("Add", x, w.node("MatMul", together, w.normal(f"{p}.o", w.heads * HEAD, w.width)))


def _rotated(w: _Writer, prefix: str, x: str) -> str:
    w.nodes.append(
        w.onnx.helper.make_node("Split", [x], [f"{prefix}.a", f"{prefix}.b"], axis=3, num_outputs=2)
    )
    turned = w.node("Concat", w.node("Neg", f"{prefix}.b"), f"{prefix}.a", axis=3)
    return w.node("Add", w.node("Mul", x, "cos"), w.node("Mul", turned, "sin"))


def _convolution(w: _Writer, layer: int, x: str) -> str:
    """A causal convolution over the last tokens, each channel by itself."""
    p = f"l{layer}"
    w.inputs.append(w.value(f"past_conv.{layer}", w.type, "batch", w.width, CONV_STATE))
    w.outputs.append(w.value(f"present_conv.{layer}", w.type, "batch", w.width, CONV_STATE))
    normed = w.norm(x, w.scale(f"{p}.conv"))
    channels = w.node("Transpose", normed, perm=[0, 2, 1])
    joined = w.node("Concat", f"past_conv.{layer}", channels, axis=2)
    ends = [w.constant(f"{p}.{n}", [v]) for n, v in (("s", -CONV_STATE), ("e", 1 << 40), ("x", 2))]
    w.node("Slice", joined, *ends, out=f"present_conv.{layer}")
    kernel = w.constant(
        f"{p}.kernel", w.random.standard_normal((w.width, 1, CONV_STATE + 1)), w.type
    )
    mixed = w.node("Conv", joined, kernel, group=w.width)
    mixed = w.node("Transpose", mixed, perm=[0, 2, 1])
    return w.node("Add", x, w.node("MatMul", mixed, w.normal(f"{p}.o", w.width, w.width)))


def _grouped(w: _Writer, x: str) -> None:
    for name, table in zip(("cos", "sin"), _rotary(HEAD // 2), strict=True):
        w.constant(name, table, w.type)
    lengths = w.node("ReduceSum", "attention_mask", w.constant("one", [1]), keepdims=0)
    lengths = w.node("Cast", w.node("Sub", lengths, "one"), to=6)
    total = w.node("Gather", w.node("Shape", "attention_mask"), w.constant("at", 1), axis=0)
    total = w.node("Cast", total, to=6)
    residual, normed = x, w.norm(x, w.scale("l0.attn"))
    for layer in range(w.layers):
        p = f"l{layer}"
        w.state(layer, "key", "value")
        packed = (w.heads + 2 * w.kv_heads) * HEAD
        qkv = w.node("MatMul", normed, w.normal(f"{p}.qkv", w.width, packed, scale=1.5))
        w.many(
            "GroupQueryAttention",
            (
                qkv, "", "", f"past.{layer}.key", f"past.{layer}.value", lengths, total, "cos",
                "sin",
            ),
            (f"{p}.picked", f"present.{layer}.key", f"present.{layer}.value"),
            num_heads=w.heads,
            kv_num_heads=w.kv_heads,
            do_rotary=1,
        )  # fmt: skip
        y = w.node("MatMul", f"{p}.picked", w.normal(f"{p}.o", w.heads * HEAD, w.width))
        residual, normed = _skip(w, f"{p}.ffn", residual, y)
        y = w.experts(p, normed) if w.kind == "onnx-experts" else w.feed(p, normed)
        following = "norm" if layer == w.layers - 1 else f"l{layer + 1}.attn"
        residual, normed = _skip(w, following, residual, y)
    w.node("MatMul", normed, w.normal("head", w.width, w.vocabulary), out="logits")


def _skip(w: _Writer, scale: str, residual: str, y: str) -> tuple[str, str]:
    outputs = (f"{scale}.normed", "", "", f"{scale}.sum")
    w.many(
        "SkipSimplifiedLayerNormalization",
        (residual, y, w.scale(scale)),
        outputs,
        epsilon=1e-5,
    )
    return outputs[3], outputs[0]
