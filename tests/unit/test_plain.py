"""Settings as plain data: there and back, and nothing else accepted."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import RemoteProtocolError
from edgellm.types import (
    KV_TYPES,
    Activations,
    EngineSettings,
    Mode,
    RopeScaling,
    SamplerSettings,
)
from edgellm.wire.plain import (
    sampler_from_plain,
    sampler_to_plain,
    settings_from_plain,
    settings_to_plain,
)

pytestmark = pytest.mark.pure

ENGINES = st.builds(
    EngineSettings,
    context=st.integers(8, 1 << 24),
    sequences=st.integers(1, 256),
    chunk=st.integers(1, 4096),
    kv_type=st.sampled_from(KV_TYPES),
    mode=st.sampled_from(Mode),
    activations=st.sampled_from(Activations),
    flash_attention=st.booleans(),
    swa_full=st.booleans(),
    threads=st.integers(0, 512),
    pin=st.lists(st.integers(0, 1023), max_size=8).map(tuple),
    rope_scaling=st.sampled_from([RopeScaling.MODEL, RopeScaling.LINEAR, RopeScaling.YARN]),
    rope_scale=st.just(0.0) | st.floats(0.01, 1e4),
    rope_freq_base=st.just(0.0) | st.floats(1.0, 1e12),
    adapters=st.lists(
        st.tuples(st.integers(0, (1 << 256) - 1).map("{:064x}".format), st.floats(-1e4, 1e4)),
        max_size=2,
        unique_by=lambda pair: pair[0],
    ).map(tuple),
)
SAMPLERS = st.builds(
    SamplerSettings,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1 << 20),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    repeat_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    penalty_last_n=st.integers(0, 4096),
    logit_bias=st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(-1e6, 1e6)), max_size=6).map(
        tuple
    ),
    seed=st.integers(0, (1 << 53) - 1),
    grammar=st.text(max_size=20),
    grammar_from=st.integers(0, (1 << 31) - 1),
    logprobs=st.integers(-1, 20),
)


def through_msgpack(data: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = msgpack.unpackb(msgpack.packb(data), use_list=False)
    return made


@given(ENGINES)
def test_engine_settings_come_back(settings: EngineSettings) -> None:
    plain = settings_to_plain(settings)
    assert plain.keys() == {field.name for field in dataclasses.fields(EngineSettings)}
    assert settings_from_plain(through_msgpack(plain)) == settings


@given(SAMPLERS)
def test_sampler_settings_come_back(settings: SamplerSettings) -> None:
    plain = sampler_to_plain(settings)
    assert plain.keys() == {field.name for field in dataclasses.fields(SamplerSettings)}
    assert sampler_from_plain(through_msgpack(plain)) == settings


@pytest.mark.parametrize(
    "change",
    [
        {"context": 1},
        {"context": 1 << 60},
        {"context": None},
        {"context": "many"},
        {"chunk": 0},
        {"sequences": 0},
        {"threads": -1},
        {"kv_type": "q9_9"},
        {"mode": "fast"},
        {"mode": None},
        {"activations": "float8"},
        {"pin": 3},
        {"pin": ["x"]},
        {"rope_scaling": "longrope"},
        {"rope_scaling": "none", "rope_scale": 2.0},
        {"rope_scale": float("nan")},
        {"rope_scale": -1.0},
        {"rope_scale": 1e9},
        {"rope_freq_base": 0.5},
        {"rope_freq_base": "high"},
        {"adapters": [["0" * 64]]},
        {"adapters": [["../x", 1.0]]},
        {"adapters": [["0" * 64, float("inf")]]},
        {"adapters": [["0" * 64, "1"]]},
        {"adapters": [["0" * 64, 1.0]] * 2},
        {"adapters": [[f"{n:064x}", 1.0] for n in range(9)]},
        {"adapters": [[f"{n:064x}", 1.0] for n in range(3)], "mode": "reference"},
        {"adapters": 3},
        {"surprise": 1},
    ],
)
def test_engine_settings_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="engine settings"):
        settings_from_plain({**settings_to_plain(EngineSettings()), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"seed": -1},
        {"seed": 1 << 60},
        {"penalty_last_n": 1 << 30},
        {"logit_bias": [[1]]},
        {"logit_bias": [[1, 2, 3]]},
        {"logit_bias": 7},
        {"logit_bias": [["x", 1.0]]},
        {"logit_bias": [[1, 1.0]] * 1025},
        {"grammar": 1},
        {"grammar": "x" * (24 * 1024 + 1)},
        {"grammar_from": -1},
        {"logprobs": 21},
        {"mirostat": 1},
    ],
)
def test_sampler_settings_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="sampler settings"):
        sampler_from_plain({**sampler_to_plain(SamplerSettings()), **change})


@pytest.mark.parametrize("name", sorted(sampler_to_plain(SamplerSettings())))
def test_every_sampler_setting_must_be_there(name: str) -> None:
    plain = sampler_to_plain(SamplerSettings())
    del plain[name]
    with pytest.raises(RemoteProtocolError, match=name):
        sampler_from_plain(plain)


@pytest.mark.parametrize("name", sorted(settings_to_plain(EngineSettings())))
def test_every_engine_setting_must_be_there(name: str) -> None:
    plain = settings_to_plain(EngineSettings())
    del plain[name]
    with pytest.raises(RemoteProtocolError, match=name):
        settings_from_plain(plain)
