"""The shard of all layers computes what the model's own file does, bit for bit.

It is what a device without the file loads as its only stage: no tokenizer, tokens come as ids.
Each comparison has a control that must differ.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgellm.engine.base import Float32, SlotRow, StageConfig
from edgellm.modelfile import open_model
from edgellm.modelfile.cut import cut
from edgellm.types import LayerSpan, Mode
from tests.contract.test_cut_architectures import run_whole
from tests.reference import WholeModel
from tests.stages import engine_of, layers_of, settings_of, stage_config
from tests.tinymodels import CONTEXT, TINY_MODELS, write_tiny_model

CHUNK = 8


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_whole_span(name: str, model_dir: Path, tmp_path: Path) -> None:
    """Straight on llama.cpp, for every architecture with a tiny model."""
    path = write_tiny_model(name, model_dir)
    model = open_model(path)
    shard = cut(model, LayerSpan(0, model.layers), tmp_path / "whole.gguf")
    expected = run_whole(path)
    with WholeModel(shard.path, chunk=CHUNK, context=CONTEXT) as whole:
        position = 0
        for call, logits in zip(expected.calls, expected.logits, strict=True):
            got = whole.decode(call, position)
            assert np.array_equal(got, logits), f"position {position}"
            position += len(call)
        whole.reset()
        control = whole.decode(expected.calls[0][::-1], 0)
    assert not np.array_equal(control, expected.logits[0])


@pytest.mark.parametrize("mode", [Mode.REFERENCE, Mode.NORMAL])
@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_whole_span_in_the_engine(kind: str, mode: Mode, model_dir: Path, tmp_path: Path) -> None:
    """As a stage that is first and last, it takes token ids like the model's own file."""
    config = stage_config(kind, (0, layers_of(kind)), settings_of(mode), model_dir)
    model = open_model(config.shard)
    shard = cut(model, config.span, tmp_path / "whole.gguf")
    mine = dataclasses.replace(config, shard=str(shard.path))
    expected, got = run(config), run(mine)
    assert len(expected) == len(got) == 4
    for theirs, ours in zip(expected, got, strict=True):
        assert np.array_equal(ours, theirs)
    other = run(mine, seed=2)
    assert not np.array_equal(other[0], expected[0])


def run(config: StageConfig, seed: int = 1) -> list[Float32]:
    """Logits of a prompt in two chunks and two decode steps."""
    tokens = np.random.default_rng(seed).integers(3, config.vocab, 16).astype(np.int32)
    found = []
    with engine_of(config) as engine:
        position = 0
        for count in (7, 6, 1, 1):
            rows = [SlotRow(0, position, count, True)]
            decoded = engine.decode(rows, tokens[position : position + count], None)
            assert decoded.logits is not None
            found.append(decoded.logits.copy())
            position += count
    return found
