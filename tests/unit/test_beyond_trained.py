"""A context beyond the trained one: what a person is told, and which models can be stretched."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgellm.answer import LoadOptions
from edgellm.errors import UsageError
from edgellm.modelref import OpenedModel, open_reference
from edgellm.planning import beyond_trained, settings_of
from edgellm.types import RopeScaling
from tests.tinymodels import CONTEXT, write_tiny_model
from tests.tinyonnx import write_tiny_onnx


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_reference(str(write_tiny_model("llama", tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (LoadOptions(), False),
        (LoadOptions(context=CONTEXT), False),
        (LoadOptions(context=CONTEXT + 1), True),
        (LoadOptions(context=2 * CONTEXT, rope_scale=2.0), False),
        (LoadOptions(context=3 * CONTEXT, rope_scale=2.0), True),
        (LoadOptions(context=2 * CONTEXT, rope_scaling=RopeScaling.YARN), True),
        (LoadOptions(context=2 * CONTEXT, rope_freq_base=1e6), False),
    ],
)
def test_who_asks_for_more_than_was_trained_is_told(
    options: LoadOptions, told: bool, opened: OpenedModel
) -> None:
    settings = settings_of(opened, options)
    assert settings.context == (options.context or CONTEXT)
    words = beyond_trained(opened, settings)
    assert bool(words) is told
    if told:
        scale = -(-settings.context // CONTEXT)
        assert f"trained for {CONTEXT} tokens" in words
        assert f"--rope-scaling yarn --rope-scale {scale}" in words
        mended = dataclasses.replace(options, rope_scaling=RopeScaling.YARN, rope_scale=scale)
        assert not beyond_trained(opened, settings_of(opened, mended))


def test_a_graph_cannot_be_stretched(tmp_path: Path) -> None:
    write_tiny_onnx("onnx-plain", tmp_path / "m")
    graph = open_reference(str(tmp_path / "m"))
    for options in (
        LoadOptions(rope_scaling=RopeScaling.LINEAR),
        LoadOptions(rope_scale=2.0),
        LoadOptions(rope_freq_base=1e6),
    ):
        with pytest.raises(UsageError, match="cannot be stretched"):
            settings_of(graph, options)
    beyond = settings_of(graph, LoadOptions(context=graph.context_train + 1))
    words = beyond_trained(graph, beyond)
    assert words
    assert "--rope" not in words
