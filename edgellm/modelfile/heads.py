"""Attention heads and other counts of a model, from its metadata, by llama.cpp's own defaults.

This file may import the model. Every count is checked: ``ModelFileError`` with its field.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgellm.errors import ModelFileError, UnsupportedModelError
from edgellm.modelfile.architectures import architecture_rule
from edgellm.modelfile.metadata import MetaValue, meta_integer
from edgellm.modelfile.model import Model

_MAX_COUNT = 1 << 24
_MAX_STREAMS = 64


def needed_count(model: Model, suffix: str) -> int:
    """The count under ``{architecture}.{suffix}``, which must be there and sensible."""
    value = model.integer(suffix)
    if value is None or not 0 < value <= _MAX_COUNT:
        field = model.key(suffix)
        raise ModelFileError(f"metadata {field!r} is {value}.", field=field)
    return value


def row_streams(metadata: Mapping[str, MetaValue], architecture: str) -> int:
    """Residual streams of a model or of its shard; a row between stages holds all of them."""
    key = architecture_rule(architecture).streams_key
    if key is None:
        return 1
    field = f"{architecture}.{key}"
    count = meta_integer(metadata, field)
    count = 1 if count is None else count
    if not 0 < count <= _MAX_STREAMS:
        raise ModelFileError(f"metadata {field!r} is {count}.", field=field)
    return count


def kv_heads(model: Model, index: int) -> int:
    """Heads of keys and values in one layer; as many as query heads where nothing else is said."""
    for suffix in ("attention.head_count_kv", "attention.head_count"):
        counts = model.per_layer(suffix)
        if counts is not None:
            if not 0 <= counts[index] <= _MAX_COUNT:
                field = model.key(suffix)
                raise ModelFileError(f"metadata {field!r} is {counts[index]}.", field=field)
            return counts[index]
    field = model.key("attention.head_count")
    raise ModelFileError(f"metadata {field!r} is missing.", field=field)


def query_heads(model: Model, index: int) -> int:
    """Query heads in one layer; 0 where the metadata does not say."""
    counts = model.per_layer("attention.head_count")
    return min(_MAX_COUNT, max(0, counts[index])) if counts is not None else 0


def head_size(model: Model, index: int, what: str, windowed: bool) -> int:
    """Elements of one key or value head, by the same defaults as llama.cpp's."""
    size = model.integer(f"attention.{what}_length_swa") if windowed else None
    size = model.integer(f"attention.{what}_length") if size is None else size
    if size is None:
        counts = model.per_layer("attention.head_count") or [0]
        head_count = next((count for count in counts if count > 0), 0)
        if head_count == 0:
            raise UnsupportedModelError(
                f"the head size of layer {index} is not known.",
                field=model.key("attention.head_count"),
            )
        size = needed_count(model, "embedding_length") // head_count
    if not 0 < size <= _MAX_COUNT:
        field = model.key(f"attention.{what}_length")
        raise ModelFileError(f"metadata {field!r} is {size}.", field=field)
    return size
