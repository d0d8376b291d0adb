"""Sizes of recurrent states, by the formulas of llama.cpp (``llama-hparams.cpp``).

This file may import the model. It is pure.
"""

from __future__ import annotations

from edgellm.modelfile.model import Model

_FLOAT = 4


def recurrent_state_bytes(model: Model) -> int:
    """Bytes of the convolution and scan states that one recurrent layer keeps for one sequence.

    float32, as llama.cpp keeps them whatever the KV type. Source: ``n_embd_r`` and ``n_embd_s``.
    """
    width = model.integer("embedding_length") or 0
    short = model.integer("shortconv.l_cache")
    if short:
        return _FLOAT * width * max(0, short - 1)
    kernel = model.integer("ssm.conv_kernel") or 0
    size = model.integer("kda.head_dim") or 0
    if size:  # Kimi's delta attention: three convolutions, and one square matrix a head
        heads = max(model.per_layer("attention.head_count") or [0])
        return _FLOAT * heads * size * (3 * max(0, kernel - 1) + size)
    inner = model.integer("ssm.inner_size") or 0
    state = model.integer("ssm.state_size") or 0
    groups = model.integer("ssm.group_count") or 0
    if inner == 0:  # linear attention: one square matrix a head
        heads = max(model.per_layer("attention.head_count") or [0])
        size = model.integer("attention.key_length") or (width // heads if heads else 0)
        return _FLOAT * size * size * heads
    convolution = max(0, kernel - 1) * (inner + 2 * groups * state)
    return _FLOAT * (convolution + state * inner)
