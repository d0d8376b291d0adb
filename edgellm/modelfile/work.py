"""What one token costs to compute: bytes to be read and operations, by layer and by span.

This file may import the model and the KV types. It reads no tensor data. How long that takes on
a device is a planner's business; nothing here knows of devices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from edgellm.modelfile.model import Model, TensorSource, layer_of

_EXPERT_MARK = "_exps."
"""In the names of tensors that hold one matrix for each expert, the experts last in the shape."""


@dataclass(frozen=True, slots=True)
class KindWork:
    """What one token costs of the weights that have one element type: each type has kernels of its
    own, and so a pace of its own."""

    kind: str
    """As ggml names it: ``q4_K``."""
    nbytes: int
    """That one token reads."""
    elements: int
    """Of those in matrices: each is one multiplication and one addition a token."""


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a span of layers costs for one token. Sums over neighbouring spans, but for the head,
    which is the last span's alone."""

    decode_bytes: int
    """Weight bytes of the layers that one token reads: of experts, only those in use."""
    prefill_flops: int
    """Two for each weight that takes part, a token of a prompt; without the head, since a prompt
    needs one row of logits only."""
    head_bytes: int = 0
    """Weight bytes of the head, read once for each row of logits: a decoded token, or a prompt."""
    scan_bytes: int = 0
    """KV cells that one token reads, and recurrent states that it reads and writes."""
    scan_flops: int = 0
    """Attention of one token over those cells."""
    by_kind: tuple[KindWork, ...] = ()
    """The weights of the layers by their type, where a file tells it: ``decode_bytes`` in all."""
    head_kind: str = ""
    """Type of the head's matrix; empty where it is not told."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The tensors of one layer, summed up."""

    nbytes: int
    largest: int
    """Bytes of the largest tensor."""
    active_bytes: int
    """Bytes that one token reads."""
    active_elements: int
    """Weights of those in matrices: each is one multiplication and one addition a token."""
    by_kind: tuple[KindWork, ...] = ()
    """The same two by element type, in the order of names."""


def layer_weights(model: Model) -> list[LayerWeights | None]:
    """One for each block of the file; None where it has no tensors.

    A tensor of a layer beyond the last block is an entry too many: the list is then longer.
    """
    found: dict[int, list[tuple[str, TensorSource]]] = {}
    for name, source in model.tensors.items():
        place = layer_of(name)
        if place is not None:
            found.setdefault(place[0], []).append((name, source))
    experts = model.integer("expert_count") or 0
    used = max(model.per_layer("expert_used_count") or [0])
    count = max(model.blocks, *(layer + 1 for layer in found)) if found else model.blocks
    return [
        _summed(found[layer], experts, used) if layer in found else None for layer in range(count)
    ]


def _summed(tensors: list[tuple[str, TensorSource]], experts: int, used: int) -> LayerWeights:
    active_bytes = active_elements = 0
    kinds: list[KindWork] = []
    for name, source in tensors:
        shape, nbytes = source.info.shape, source.info.nbytes
        elements = math.prod(shape) if len(shape) > 1 else 0
        if _EXPERT_MARK in name and shape and shape[-1] == experts and 0 < used <= experts:
            nbytes, elements = nbytes * used // experts, elements * used // experts
        active_bytes += nbytes
        active_elements += elements
        kinds.append(KindWork(source.info.type.name, nbytes, elements))
    sizes = [source.info.nbytes for _, source in tensors]
    summed = summed_kinds((tuple(kinds),))
    return LayerWeights(sum(sizes), max(sizes), active_bytes, active_elements, summed)


def summed_kinds(layers: Iterable[tuple[KindWork, ...]]) -> tuple[KindWork, ...]:
    """The work of several layers together, by element type."""
    total: dict[str, tuple[int, int]] = {}
    for layer in layers:
        for one in layer:
            read, counted = total.get(one.kind, (0, 0))
            total[one.kind] = read + one.nbytes, counted + one.elements
    return tuple(KindWork(kind, *total[kind]) for kind in sorted(total))


def main_type(model: Model) -> str:
    """The type of most weight bytes in layers: 'q4_K' for the usual mixture Q4_K_M."""
    weights: Counter[str] = Counter()
    for name, source in model.tensors.items():
        if layer_of(name) is not None:
            weights[source.info.type.name] += source.info.nbytes
    return weights.most_common(1)[0][0] if weights else "unknown"
