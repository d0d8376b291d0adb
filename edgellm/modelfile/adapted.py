"""The card of a model that LoRA adapters act on: each layer weighs and computes as much more.

This file may import the card and the adapters. It is pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from edgellm.modelfile.card import LayerCard, ModelCard
from edgellm.modelfile.lora import Adapter, Pair
from edgellm.modelfile.recipe import HEAD
from edgellm.modelfile.work import KindWork, summed_kinds


def adapted(card: ModelCard, adapters: Sequence[Adapter]) -> ModelCard:
    """The card of ``card``'s model with ``adapters``."""
    pairs = [pair for adapter in adapters for pair in adapter.pairs]
    outer = [pair for pair in pairs if pair.layer is None]
    head = sum(pair.nbytes for pair in outer if pair.name == HEAD)
    uncut = next((a.whole_only for a in adapters if a.whole_only), "") or card.uncut
    if not uncut and sum(a.embedding is not None for a in adapters) > 1:
        # llama.cpp adds them up in an order of its own, which a cut model could not follow.
        uncut = "two adapters change its token embeddings: with both it runs on one device alone"
    return replace(
        card,
        layers=tuple(
            _layer(layer, [pair for pair in pairs if pair.layer == layer.index])
            for layer in card.layers
        ),
        head_bytes=card.head_bytes + head,
        head_read_bytes=card.head_read_bytes + head,
        outer_bytes=card.outer_bytes + sum(pair.nbytes for pair in outer),
        boundaries=() if uncut else card.boundaries,
        uncut=uncut,
    )


def _layer(layer: LayerCard, pairs: Sequence[Pair]) -> LayerCard:
    nbytes = sum(pair.nbytes for pair in pairs)
    kinds = tuple(
        KindWork(half.type.name, half.nbytes, math.prod(half.shape))
        for pair in pairs
        for half in (pair.a, pair.b)
    )
    return replace(
        layer,
        weight_bytes=layer.weight_bytes + nbytes,
        active_bytes=layer.active_bytes + nbytes,
        active_elements=layer.active_elements + sum(kind.elements for kind in kinds),
        active_by_kind=summed_kinds((layer.active_by_kind, kinds)),
    )
