"""What kind each layer of a model is, and which spans of layers a stage may hold.

This file may import the model and the architecture rules. It is pure: it reads metadata only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgellm.errors import ModelFileError, SplitError, UnsupportedModelError
from edgellm.modelfile.architectures import (
    LEADERS_KEY,
    ArchitectureRule,
    Recurrence,
    Support,
    Window,
    architecture_rule,
)
from edgellm.modelfile.model import Model
from edgellm.types import LayerSpan

MAX_WINDOW = 1 << 31


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer keeps between tokens."""

    attention: bool
    recurrent: bool
    window: int | None
    """Sliding window in tokens; None: the layer attends to everything before it."""


def layer_kinds(model: Model) -> tuple[LayerKind, ...]:
    """The kind of every layer; raises ``ModelFileError`` for metadata that does not fit."""
    rule = architecture_rule(model.architecture)
    recurrent = recurrent_flags(model, rule)
    attention = _attention_flags(model, rule, recurrent)
    size, windowed = window_flags(model, rule.window)
    return tuple(
        LayerKind(attention[i], recurrent[i], size if windowed[i] and attention[i] else None)
        for i in range(model.layers)
    )


def recurrent_flags(model: Model, rule: ArchitectureRule) -> list[bool]:
    """Which layers carry a recurrent state."""
    match rule.recurrence:
        case Recurrence.NONE:
            return [False] * model.layers
        case Recurrence.ALL | Recurrence.EVERY:
            return [True] * model.layers
        case Recurrence.INTERVAL:
            told = model.per_layer("attention.recurrent_layers")
            if told is not None:
                return [bool(flag) for flag in told]
            interval = model.integer("full_attention_interval") or 4
            return [(i + 1) % interval != 0 for i in range(model.layers)]
        case Recurrence.NO_KV_HEADS | Recurrence.NO_KV_HEADS_NO_FFN:
            heads = _kv_heads(model)
            if rule.recurrence is Recurrence.NO_KV_HEADS:
                return [count == 0 for count in heads]
            widths = model.per_layer("feed_forward_length") or [0] * model.layers
            return [h == 0 and w == 0 for h, w in zip(heads, widths, strict=True)]


def _kv_heads(model: Model) -> list[int]:
    heads = model.per_layer("attention.head_count_kv") or model.per_layer("attention.head_count")
    if heads is None:
        field = model.key("attention.head_count")
        raise ModelFileError(f"metadata {field!r} is missing.", field=field)
    return heads


def _attention_flags(model: Model, rule: ArchitectureRule, recurrent: list[bool]) -> list[bool]:
    if rule.recurrence is Recurrence.EVERY:
        return [True] * model.layers
    if rule.recurrence is Recurrence.NO_KV_HEADS_NO_FFN:
        widths = model.per_layer("feed_forward_length") or [0] * model.layers
        return [h > 0 and w == 0 for h, w in zip(_kv_heads(model), widths, strict=True)]
    return [not flag for flag in recurrent]


def window_flags(model: Model, window: Window | None) -> tuple[int, list[bool]]:
    """``(size, flag of each layer)``: which layers attend only to the last ``size`` tokens."""
    whole = [False] * model.layers
    if window is None:
        return 0, whole
    size = model.integer("attention.sliding_window")
    size = window.default_size if size is None else size
    if not 0 <= size < MAX_WINDOW:
        field = model.key("attention.sliding_window")
        raise ModelFileError(f"metadata {field!r} is {size}.", field=field)
    if size == 0:
        return 0, whole
    suffix = "attention.sliding_window_pattern"
    told = model.metadata.get(model.key(suffix))
    if told is not None and told.is_array:
        return size, [bool(flag) for flag in model.per_layer(suffix) or ()]
    period = window.period if told is None else model.integer(suffix) or 0
    if period < 0:
        raise ModelFileError(f"metadata {suffix!r} is {period}.", field=model.key(suffix))
    if period == 0:
        return size, [True] * model.layers
    full = 0 if window.full_first else period - 1
    return size, [i % period != full for i in range(model.layers)]


def boundary_step(model: Model, rule: ArchitectureRule) -> int:
    """Boundaries must be multiples of this."""
    step = rule.boundary_multiple
    if rule.boundary_step_key is not None:
        step = math.lcm(step, max(1, model.integer(rule.boundary_step_key) or 1))
    return step


def span_problem(model: Model, span: LayerSpan) -> str | None:
    """Why a stage may not hold ``span``, in words; None if it may.

    The whole model is always allowed where the architecture is supported at all.
    """
    rule = architecture_rule(model.architecture)
    if span.end > model.layers:
        return f"the model has {model.layers} layers"
    if len(span) == model.layers:
        return None
    if rule.support is Support.SOLO:
        return f"architecture {model.architecture!r} cannot be cut: {rule.reason}"
    for suffix in rule.zero_keys:
        if model.integer(suffix):
            return f"{model.key(suffix)} is {model.integer(suffix)}: its layers share that"
    counts = {model.layers, len(span)} & rule.layer_counts
    if counts:
        return f"{model.architecture} with {counts.pop()} layers computes something else"
    step = boundary_step(model, rule)
    if span.first % step or (span.end % step and span.end != model.layers):
        return f"boundaries must be multiples of {step}"
    if rule.needs_value is not None and not _holds(model, span, *rule.needs_value):
        return f"a stage needs a layer with {rule.needs_value[1]} in {rule.needs_value[0]}"
    looking = model.integer(rule.token_layers_key) if rule.token_layers_key is not None else 0
    if 0 < span.first < (looking or 0):
        return f"the first {looking} layers look at tokens, which only the first stage has"
    dense = model.integer("leading_dense_block_count") or 0
    if rule.past_lead and span.end <= dense:
        return f"a stage needs more than the first {dense} layers"
    return _leader_problem(model, rule, span) or _kinds_problem(layer_kinds(model), rule, span)


def _holds(model: Model, span: LayerSpan, suffix: str, number: int) -> bool:
    told = model.metadata.get(model.key(suffix))
    return told is not None and told.is_array and number in told.items()[span.first : span.end]


def _leader_problem(model: Model, rule: ArchitectureRule, span: LayerSpan) -> str | None:
    """A layer that follows another's selection of tokens cannot be the first of a stage."""
    if not rule.leaders:
        return None
    leads = model.per_layer(LEADERS_KEY)
    if leads is None:
        trained = model.integer("context_length") or 0
        if rule.leaders_from and trained >= rule.leaders_from:
            return "its file does not say which layers select tokens for others"
        return None
    kinds = layer_kinds(model)
    attending = [layer for layer in range(span.first, span.end) if kinds[layer].attention]
    if attending and not leads[attending[0]]:
        return f"layer {attending[0]} uses the tokens that the one before it selected"
    return None


def _kinds_problem(
    kinds: tuple[LayerKind, ...], rule: ArchitectureRule, span: LayerSpan
) -> str | None:
    """llama.cpp aborts where a stage has no layer of a kind that its graph insists on.

    A hybrid's graph wants both kinds; one with sliding windows wants a windowed layer, but does
    without a full one.
    """
    held = kinds[span.first : span.end]
    if rule.needs_window and all(kind.window is None for kind in kinds):
        return "without a sliding window the last layer of a stage would be computed otherwise"
    if any(kind.window is not None for kind in kinds) and all(k.window is None for k in held):
        return "a stage needs at least one layer with a sliding window"
    if rule.window is not None and rule.window.both and all(k.window is not None for k in held):
        return "a stage needs at least one layer without a sliding window"
    if rule.recurrence in (Recurrence.NONE, Recurrence.ALL, Recurrence.EVERY):
        return None
    if not any(kind.attention for kind in held):
        return "a stage needs at least one attention layer"
    if not any(kind.recurrent for kind in held):
        return "a stage needs at least one recurrent layer"
    return None


def legal_boundaries(model: Model) -> tuple[int, ...]:
    """Layers ``b`` at which the model may be cut in two: ``[0, b)`` and ``[b, layers)``."""
    return tuple(
        b
        for b in range(1, model.layers)
        if span_problem(model, LayerSpan(0, b)) is None
        and span_problem(model, LayerSpan(b, model.layers)) is None
    )


def check_span(model: Model, span: LayerSpan) -> None:
    """Raise ``UnsupportedModelError`` or ``SplitError`` (with the reason) for an illegal span."""
    problem = span_problem(model, span)
    if problem is None:
        return
    message = f"layers [{span.first}, {span.end}) cannot be a stage: {problem}."
    if architecture_rule(model.architecture).support is Support.SOLO:
        raise UnsupportedModelError(message, field="general.architecture")
    allowed = ", ".join(map(str, legal_boundaries(model)))
    raise SplitError(message, hint=f"This model can be cut at {allowed or 'no layer'}.")
