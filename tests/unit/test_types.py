"""The shared nouns refuse what cannot be, and are what they seem."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgellm.errors import UsageError
from edgellm.types import (
    KV_TYPES,
    DeviceId,
    EngineSettings,
    Epoch,
    LayerSpan,
    Plan,
    SamplerSettings,
    Stage,
)

pytestmark = pytest.mark.pure


def test_a_span_is_half_open() -> None:
    span = LayerSpan(2, 5)
    assert len(span) == 3
    assert [layer for layer in range(8) if layer in span] == [2, 3, 4]
    assert LayerSpan(0, 2) < span


@pytest.mark.parametrize(("first", "end"), [(0, 0), (3, 2), (-1, 2), (-2, -1)])
def test_an_empty_or_negative_span_is_refused(first: int, end: int) -> None:
    with pytest.raises(UsageError, match="empty or negative"):
        LayerSpan(first, end)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("context", 8, 1 << 24),
        ("sequences", 1, 256),
        ("chunk", 1, 4096),
        ("threads", 0, 512),
    ],
)
def test_engine_settings_have_bounds(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(EngineSettings(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (low - 1, high + 1):
        with pytest.raises(UsageError, match=name):
            EngineSettings(**{name: value})  # type: ignore[arg-type]


def test_kv_types_are_known_by_name() -> None:
    assert [EngineSettings(kv_type=name).kv_type for name in KV_TYPES] == list(KV_TYPES)
    with pytest.raises(UsageError, match="'q3_k' is unknown") as caught:
        EngineSettings(kv_type="q3_k")
    assert "q8_0" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repeat_penalty", 0.01, 100.0),
        ("presence_penalty", -100.0, 100.0),
        ("frequency_penalty", -100.0, 100.0),
    ],
)
def test_sampler_settings_have_bounds(name: str, low: float, high: float) -> None:
    for value in (low, high):
        assert getattr(SamplerSettings(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (low - 0.1, high + 0.1, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(UsageError, match=name):
            SamplerSettings(**{name: value})  # type: ignore[arg-type]


def test_greedy_is_temperature_zero() -> None:
    assert SamplerSettings(temperature=0.0).greedy
    assert not SamplerSettings(temperature=0.01).greedy


def test_too_many_biases_are_refused() -> None:
    SamplerSettings(logit_bias=((1, 1.0),) * 1024)
    with pytest.raises(UsageError, match="1024"):
        SamplerSettings(logit_bias=((1, 1.0),) * 1025)


def plan(*spans: tuple[int, int], layers: int) -> Plan:
    stages = [
        Stage(name, DeviceId(name * 64), LayerSpan(*span), 1)
        for name, span in zip("abcdef", spans, strict=False)
    ]
    return Plan(Epoch(1), layers, tuple(stages))


def test_a_plan_holds_every_layer_once_in_order() -> None:
    assert len(plan((0, 2), (2, 5), layers=5).stages) == 2
    for spans, words in (
        (((0, 2), (3, 5)), "begins at layer 3, but layer 2 is next"),
        (((0, 3), (2, 5)), "begins at layer 2, but layer 3 is next"),
        (((1, 5),), "begins at layer 1"),
        (((0, 4),), "end at layer 4 of 5"),
        (((0, 6),), "end at layer 6 of 5"),
        (((2, 5), (0, 2)), "begins at layer 2"),
        ((), "end at layer 0 of 5"),
    ):
        with pytest.raises(UsageError, match=words):
            plan(*spans, layers=5)


@pytest.mark.parametrize("value", [EngineSettings(), SamplerSettings(), LayerSpan(0, 1)])
def test_values_are_frozen_and_hold_nothing_else(value: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, 1)
    assert not hasattr(value, "__dict__")
    assert hash(value) == hash(dataclasses.replace(value))
