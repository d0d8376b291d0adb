"""Stages of a cut model together compute the whole model's logits, bit for bit.

For every architecture with a tiny model: at every legal boundary, a prompt of 16 tokens in two
chunks and 8 decode steps, compared with the undisturbed whole model. Maximum difference 0, no
tolerance. Each run has a negative control that must differ: the second stage is given the first
one's rows in another order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from edgellm.errors import SplitError, UnsupportedModelError
from edgellm.modelfile import Model, open_model, read_card, read_shard
from edgellm.modelfile.cut import cut, write_embedding
from edgellm.types import LayerSpan
from tests.reference import EmbeddingTable, FloatRows, StageRunner, WholeModel, set_fields
from tests.tinymodels import CONTEXT, TINY_MODELS, VOCABULARY, write_tiny_model

CHUNK = 8
PROMPT = 16
STEPS = 8


@dataclass(frozen=True)
class Expected:
    """What the whole model does: the tokens it was given, and its logits after each call."""

    calls: tuple[tuple[int, ...], ...]
    logits: tuple[FloatRows, ...]


def run_whole(path: Path) -> Expected:
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, VOCABULARY, PROMPT)]
    calls = [tuple(tokens[:CHUNK]), tuple(tokens[CHUNK:])]
    logits: list[FloatRows] = []
    with WholeModel(path, chunk=CHUNK, context=CONTEXT) as whole:
        position = 0
        for call in calls:
            logits.append(whole.decode(call, position))
            position += len(call)
        for _ in range(STEPS):
            calls.append((int(logits[-1].argmax()),))
            logits.append(whole.decode(calls[-1], position))
            position += 1
    return Expected(tuple(calls), tuple(logits))


def run_stages(
    stages: Sequence[StageRunner], table: EmbeddingTable, expected: Expected
) -> list[FloatRows]:
    """The same calls through all stages."""
    logits = []
    position = 0
    for call in expected.calls:
        rows = table(call)
        for stage in stages:
            rows = stage.run(rows, position)
        logits.append(rows)
        position += len(call)
    return logits


def permuted_control(
    stages: Sequence[StageRunner], table: EmbeddingTable, expected: Expected
) -> FloatRows:
    """Logits after the first chunk when the last stage is given its rows in reverse order."""
    for stage in stages:
        stage.reset()
    rows = table(expected.calls[0])
    for stage in stages[:-1]:
        rows = stage.run(rows, 0)
    return stages[-1].run(rows[::-1], 0)


def check_split(model: Model, spans: Sequence[LayerSpan], folder: Path, expected: Expected) -> None:
    """Cut ``model`` into ``spans``, run them, compare; then the control."""
    table = EmbeddingTable(write_embedding(model, folder / "embedding.gguf"))
    stages: list[StageRunner] = []
    try:
        for span in spans:
            shard = cut(model, span, folder / f"{span.first}-{span.end}.gguf")
            stages.append(StageRunner(shard, chunk=CHUNK, context=CONTEXT))
        got = run_stages(stages, table, expected)
        control = permuted_control(stages, table, expected)
    finally:
        for stage in stages:
            stage.close()
    for call, (mine, theirs) in enumerate(zip(got, expected.logits, strict=True)):
        difference = float(np.abs(mine - theirs).max())
        assert np.array_equal(mine, theirs), f"{spans}: call {call} differs by {difference}"
    assert not np.array_equal(control, expected.logits[0]), f"{spans}: the control saw nothing"


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, model_dir: Path) -> Path:
    return write_tiny_model(request.param, model_dir)


def test_every_legal_boundary(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    expected = run_whole(tiny)
    boundaries = read_card(model).boundaries
    assert boundaries
    for boundary in boundaries:
        spans = [LayerSpan(0, boundary), LayerSpan(boundary, model.layers)]
        check_split(model, spans, tmp_path, expected)


def test_as_many_stages_as_possible(tiny: Path, tmp_path: Path) -> None:
    """One layer a stage where that is legal: middle stages, and stages of one kind of layer."""
    model = open_model(tiny)
    card = read_card(model)
    spans: list[LayerSpan] = []
    first = 0
    for boundary in (*card.boundaries, model.layers):
        rest = LayerSpan(boundary, model.layers) if boundary < model.layers else None
        fits = card.span_problem(LayerSpan(first, boundary)) is None
        if fits and (rest is None or card.span_problem(rest) is None):
            spans.append(LayerSpan(first, boundary))
            first = boundary
    assert len(spans) >= 2
    check_split(model, spans, tmp_path, run_whole(tiny))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3moe"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_quantised(name: str, kind: str, model_dir: Path, tmp_path: Path) -> None:
    """Quantised weights, which processors repack: the shard's must be repacked the same way."""
    path = tmp_path / "quantised.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    set_fields(parameters, ftype=file_type, nthread=1)
    source = write_tiny_model(name, model_dir)
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(parameters)
    )
    assert status == 0
    model = open_model(path)
    expected = run_whole(path)
    check_split(model, [LayerSpan(0, 2), LayerSpan(2, model.layers)], tmp_path, expected)


@pytest.mark.models
@pytest.mark.parametrize("name", ["stories260K-f32.gguf", "TinyStories-656K-q8_0.gguf"])
def test_trained_models(name: str, shared_models: Path, tmp_path: Path) -> None:
    path = shared_models / name
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    model = open_model(path)
    expected = run_whole(path)
    for boundary in read_card(model).boundaries:
        spans = [LayerSpan(0, boundary), LayerSpan(boundary, model.layers)]
        check_split(model, spans, tmp_path, expected)


def test_hybrid_needs_both_kinds(model_dir: Path, tmp_path: Path) -> None:
    """llama.cpp would abort on a stage with convolutions only: it is never made."""
    model = open_model(write_tiny_model("lfm2", model_dir))
    assert read_card(model).boundaries == (2, 3, 4)
    with pytest.raises(SplitError, match="attention"):
        cut(model, LayerSpan(0, 1), tmp_path / "refused.gguf")
    assert not list(tmp_path.iterdir())


def test_layer_counts_that_change_the_arithmetic(tmp_path: Path) -> None:
    """Gemma 2 with 46 layers (27B) scales attention otherwise; a part of it would not."""
    model = open_model(write_tiny_model("gemma2", tmp_path, layers=46))
    card = read_card(model)
    assert card.boundaries == ()
    assert "46" in (card.span_problem(LayerSpan(0, 2)) or "")
    with pytest.raises((SplitError, UnsupportedModelError)):
        cut(model, LayerSpan(0, 2), tmp_path / "refused.gguf")


def test_shard_is_deterministic_and_describes_itself(model_dir: Path, tmp_path: Path) -> None:
    model = open_model(write_tiny_model("gemma2", model_dir))
    first = cut(model, LayerSpan(2, 4), tmp_path / "one.gguf")
    second = cut(model, LayerSpan(2, 4), tmp_path / "two.gguf")
    assert first.path.read_bytes() == second.path.read_bytes()
    shard = read_shard(second.path)
    assert (shard.span, shard.layers, shard.model_digest) == (LayerSpan(2, 4), 5, model.digest)
    assert shard.input_node == "inp_scaled"
    assert not shard.first
    assert not shard.last
