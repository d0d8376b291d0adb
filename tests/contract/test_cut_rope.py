"""A context beyond the trained one, by stretched rotary positions: stages compute the whole's bits.

The model is said to be trained for 256 tokens; it runs over 320. The whole model gets the same
setting straight from us, in llama.cpp's own fields. Each setting must change the logits, and so
must a later stage that was not told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.modelfile import read_card
from edgellm.types import EngineSettings, RopeScaling
from tests.cutmodels import Calls, logits_of, open_cut, whole_calls
from tests.quantised import CONTEXT, quantise, write_wide_llama
from tests.stages import settings_of
from tests.tinymodels import TINY_MODELS, write_tiny_model

CUTS = ((0, 1), (1, 3), (3, 4))
PROMPT = 320
CHUNK = 64
CELLS = 512

SETTINGS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "linear": (
        {"rope_scaling": RopeScaling.LINEAR, "rope_scale": 2.0},
        {"rope_scaling_type": 1, "rope_freq_scale": 0.5},
    ),
    "yarn": (
        {"rope_scaling": RopeScaling.YARN, "rope_scale": 3.0},
        {"rope_scaling_type": 2, "rope_freq_scale": np.float32(1) / np.float32(3)},
    ),
    "base": ({"rope_freq_base": 50_000.0}, {"rope_freq_base": 50_000.0}),
    "scale alone": ({"rope_scale": 4.0}, {"rope_freq_scale": 0.25}),
}
"""Ours, and what llama.cpp is to be told."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rope")
    return quantise(write_wide_llama(folder), folder, ["Q8_0"])["Q8_0"]


def whole(path: Path, fields: Mapping[str, Any]) -> Calls:
    return whole_calls(path, prompt=PROMPT, chunk=CHUNK, context=CELLS, steps=4, fields=fields)


@pytest.fixture(scope="module")
def plain(base: Path) -> Calls:
    return whole(base, {})


def settings_with(**ours: Any) -> EngineSettings:
    plain = settings_of(context=CELLS, chunk=CHUNK, sequences=1)
    return dataclasses.replace(plain, **ours)


@pytest.mark.parametrize("name", SETTINGS)
def test_stretched_positions(name: str, base: Path, plain: Calls, tmp_path: Path) -> None:
    ours, fields = SETTINGS[name]
    assert PROMPT > CONTEXT
    expected = whole(base, fields)
    assert not np.array_equal(expected.logits[0], plain.logits[0]), "the setting does nothing"
    with open_cut(base, CUTS, settings_with(**ours), tmp_path) as stages:
        got = logits_of(stages, expected.calls)
    for call, (mine, theirs) in enumerate(zip(got, expected.logits, strict=True)):
        assert np.array_equal(mine, theirs), f"call {call}: {np.abs(mine - theirs).max()}"


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["linear", "yarn", "base"])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_every_architecture(name: str, setting: str, model_dir: Path, tmp_path: Path) -> None:
    """Sliding windows, sections of positions and factors of their own, each in its own way."""
    path = write_tiny_model(name, model_dir)
    card = read_card(path)
    ours, fields = SETTINGS[setting]
    middle = card.boundaries[len(card.boundaries) // 2]
    cuts = ((0, middle), (middle, card.n_layers))
    settings = dataclasses.replace(settings_of(chunk=8), **ours)
    expected = whole_calls(path, fields=fields)
    with open_cut(path, cuts, settings, tmp_path) as stages:
        got = logits_of(stages, expected.calls)
        stages.permute = True
        control = logits_of(stages, expected.calls[:1])
    assert all(np.array_equal(*pair) for pair in zip(got, expected.logits, strict=True))
    assert not np.array_equal(control[0], expected.logits[0])


def test_a_stage_that_was_not_told_is_seen(base: Path, tmp_path: Path) -> None:
    """The control of all of the above: only the last stage goes on as the model was trained."""
    ours, fields = SETTINGS["yarn"]
    expected = whole(base, fields)
    with (
        open_cut(base, CUTS[:2], settings_with(**ours), tmp_path) as told,
        open_cut(base, CUTS[2:], settings_with(), tmp_path) as untold,
    ):
        told.runners = [*told.runners, *untold.runners]
        got = logits_of(told, expected.calls[:1])
    assert not np.array_equal(got[0], expected.logits[0])
