"""What a stage loads must be what the plan says: layers, model, shape, and which files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgellm.errors import ModelFileError
from edgellm.modelfile import Model, open_model
from edgellm.modelfile.cut import cut, write_embedding
from edgellm.store.shards import ModelShape, stage_files
from edgellm.types import LayerSpan
from tests.tinymodels import VOCABULARY, WIDTH, write_tiny_model

LAYERS = 8
SHAPE = ModelShape(LAYERS, WIDTH, VOCABULARY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(write_tiny_model("gemma3", tmp_path_factory.mktemp("model"), layers=LAYERS))


@pytest.fixture(scope="module")
def embedding(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding(model, tmp_path_factory.mktemp("embedding") / "e.gguf")


@pytest.mark.parametrize("span", [(0, 4), (4, 8), (2, 6), (0, 8)])
def test_files_of_every_kind_of_stage(
    span: tuple[int, int], model: Model, embedding: Path, tmp_path: Path
) -> None:
    shard = cut(model, LayerSpan(*span), tmp_path / "s.gguf")
    table = embedding if span == (0, 4) else None
    files = stage_files(shard.path, table, digest=model.digest, span=shard.span, shape=SHAPE)
    assert (files.shard, files.embedding) == (shard.path, table)
    assert files.residual == shard.residual_node
    assert files.input_node == (shard.input_node or "")
    assert files.embedding_scale == (math.sqrt(WIDTH) if table else 1.0)


def test_files_that_are_not_what_the_plan_says(
    model: Model, embedding: Path, tmp_path: Path
) -> None:
    llama = open_model(write_tiny_model("llama", tmp_path))
    other = write_embedding(llama, tmp_path / "other.gguf")
    first = cut(model, LayerSpan(0, 4), tmp_path / "first.gguf").path
    last = cut(model, LayerSpan(4, 8), tmp_path / "last.gguf").path
    whole, span = LayerSpan(0, 4), LayerSpan(4, 8)
    stage_files(first, embedding, digest=model.digest, span=whole, shape=SHAPE)
    stage_files(last, None, digest=model.digest, span=span, shape=SHAPE)
    wrong: list[tuple[Path, Path | None, str, LayerSpan, ModelShape]] = [
        (last, None, model.digest, LayerSpan(3, 8), SHAPE),
        (last, None, "0" * 64, span, SHAPE),
        (last, None, model.digest, span, ModelShape(9, WIDTH, VOCABULARY)),
        (last, None, model.digest, span, ModelShape(LAYERS, WIDTH + 1, VOCABULARY)),
        (last, None, model.digest, span, ModelShape(LAYERS, WIDTH, VOCABULARY + 1)),
        (last, embedding, model.digest, span, SHAPE),
        (first, None, model.digest, whole, SHAPE),
        (first, other, model.digest, whole, SHAPE),
        (first, last, model.digest, whole, SHAPE),
        (first, embedding, model.digest, whole, ModelShape(LAYERS, WIDTH, VOCABULARY + 1)),
        (model.paths[0], None, model.digest, span, SHAPE),
    ]
    for shard, table, digest, layers, shape in wrong:
        with pytest.raises(ModelFileError):
            stage_files(shard, table, digest=digest, span=layers, shape=shape)
