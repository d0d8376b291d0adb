"""A deeper model of the same architecture: a tiny model's layers over again, with other weights.

Many architectures alternate kinds of layers, and a model of two or three layers then has no place
where both parts would have every kind. The deeper one has: layer ``i`` has the tensors of layer
``i`` modulo the original's number, rolled by ``i``, so that no two layers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.errors import UnsupportedModelError
from edgellm.modelfile import Model
from edgellm.modelfile.architectures import PER_LAYER_FULL_KEYS, PER_LAYER_KEYS
from edgellm.modelfile.ggml_types import ValueType
from edgellm.modelfile.metadata import MetaValue, array_value, scalar_value
from edgellm.modelfile.model import layer_of
from edgellm.modelfile.writer import TensorLayout, encode_header, padding, write_atomically

_FEED_FORWARD = ("ffn_", "exp_probs_b")
"""How the names of a layer's feed-forward tensors begin. The norm is of every kind of layer."""
_INDEXER = "indexer."
_ROLLED: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
_STEP = "interleave_moe_layer_step"
_ROLL = 17
"""Elements by which each further layer's weights are rolled; odd, so that no row stays whole."""


def write_deeper(model: Model, factor: int, destination: Path) -> None:
    """Write a model with ``factor`` times the layers of ``model`` to ``destination``.

    Raises UnsupportedModelError for weights that are not float32 or float16: rolling others would
    break their blocks.
    """
    layers = model.layers * factor
    tensors = list(_tensors(model, layers))
    header = encode_header(_metadata(model, layers), [layout for layout, _, _ in tensors])

    def chunks() -> Iterator[bytes]:
        yield header
        for layout, source, shift in tensors:
            data = model.read(source)
            if shift:
                data = np.roll(np.frombuffer(data, _ROLLED[layout.type.name]), shift).tobytes()
            yield data + bytes(padding(len(data)))

    write_atomically(destination, chunks())


def _metadata(model: Model, layers: int) -> dict[str, MetaValue]:
    found = dict(model.metadata)
    for key, value in model.metadata.items():
        suffix = key.removeprefix(f"{model.architecture}.")
        per_layer = suffix in PER_LAYER_KEYS or key in PER_LAYER_FULL_KEYS
        if per_layer and value.element is not None:
            items = value.items()[: model.layers]
            found[key] = array_value(value.element, items * (layers // model.layers))
    told = {"block_count": layers, "nextn_predict_layers": 0}
    if not _interleaved(model):
        told[_STEP] = 1
    for suffix, number in told.items():
        if model.key(suffix) in found:
            found[model.key(suffix)] = scalar_value(ValueType.UINT32, number)
    return found


def _interleaved(model: Model) -> bool:
    """Whether dense and expert layers alternate. Not where some dense ones lead: llama.cpp loads
    all others as experts then, whatever the step."""
    lead = model.integer("leading_dense_block_count") or 0
    return (model.integer(_STEP) or 0) > 1 and not lead


def _tensors(model: Model, layers: int) -> Iterator[tuple[TensorLayout, str, int]]:
    """(layout, source tensor, elements to roll it by) of every tensor of the deeper model."""
    for name, source in model.tensors.items():
        if layer_of(name) is None:
            info = source.info
            yield TensorLayout(name, info.shape, info.type, info.nbytes), name, 0
    moved = _feed_forward(model)
    for layer in range(layers):
        for original, feed_forward in (
            (layer % model.layers, False),
            (_feed_forward_of(model, layer), True),
        ):
            for name, source in model.tensors.items():
                place = layer_of(name)
                if place is None or place[0] != original:
                    continue
                if place[1].startswith(moved) is not feed_forward:
                    continue
                info = source.info
                if info.type.name not in _ROLLED:
                    raise UnsupportedModelError(
                        f"a deeper model cannot be made of {info.type.name} weights.", field=name
                    )
                layout = TensorLayout(f"blk.{layer}.{place[1]}", info.shape, info.type, info.nbytes)
                yield layout, name, 0 if layer < model.layers else _ROLL * layer


def _feed_forward(model: Model) -> tuple[str, ...]:
    """How the names begin of all tensors that only layers behind the leading dense ones have."""
    lead = model.integer("leading_dense_block_count") or 0
    places = filter(None, map(layer_of, model.tensors))
    indexed = {layer for layer, rest in places if rest.startswith(_INDEXER)}
    if min(indexed, default=0) < lead or not lead:
        return _FEED_FORWARD
    return (*_FEED_FORWARD, _INDEXER)


def _feed_forward_of(model: Model, layer: int) -> int:
    """The layer of the original that has the feed-forward of a deeper one's ``layer``: dense ones
    lead once, not over and over again."""
    lead = model.integer("leading_dense_block_count") or 0
    if _interleaved(model) or layer < model.layers or not 0 < lead < model.layers:
        return layer % model.layers
    return lead + (layer - lead) % (model.layers - lead)
