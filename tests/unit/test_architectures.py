"""The architecture rules on headers alone: which spans may be stages, why not, what shards say.

That the rules are right is the business of ``tests/contract/test_arch_coverage.py`` and of
``scripts/arch_coverage``; here is what a rule does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.engine.server import stage_config_from, stage_config_to
from edgellm.modelfile import open_model, read_card, shard_recipe, write_embedding
from edgellm.modelfile.architectures import ARCHITECTURES, Support
from edgellm.modelfile.cut import cut
from edgellm.modelfile.ggml_types import ValueType
from edgellm.modelfile.metadata import MetaValue, array_value, scalar_value
from edgellm.modelfile.model import MAX_LAYERS
from edgellm.planner import DeviceOffer, plan_for
from edgellm.runtime.terms import stage_config
from edgellm.store.shards import ModelShape, stage_files
from edgellm.types import DeviceId, EngineSettings, Epoch, LayerSpan
from edgellm.wire.messages import LoadStage
from edgellm.wire.plain import settings_to_plain
from tests.tinyarchs import TINY_ARCHS
from tests.tinymodels import WIDTH, write_recipe
from tests.unit.test_card import describe


def whole(number: int) -> MetaValue:
    return scalar_value(ValueType.UINT32, number)


def each(*numbers: int) -> MetaValue:
    return array_value(ValueType.UINT32, numbers)


HALF = [1, 0] * 4
"""Flags of eight layers."""


@pytest.mark.parametrize(
    ("architecture", "told", "layers", "boundaries"),
    [
        # Positions are left out in every fourth layer, counted from the first of the file.
        ("afmoe", {"attention.sliding_window": whole(8)}, 12, (4, 8)),
        ("llama4", {"interleave_moe_layer_step": whole(2)}, 12, (4, 8)),
        ("llama4", {"attention.sliding_window": whole(0)}, 12, ()),
        # A shard of exactly four layers would have them in all.
        ("smallthinker", {"attention.sliding_window": whole(8)}, 16, (8,)),
        # Layers that follow what the one before selected.
        ("glm-dsa", {"attention.indexer.types": each(*HALF)}, 8, (2, 4, 6)),
        ("glm-dsa", {}, 3, (1, 2)),
        ("glm-dsa", {"context_length": whole(1 << 20)}, 3, ()),
        # A stage with nothing but leading dense layers has no cache for what others keep.
        ("minimax-m3", {"leading_dense_block_count": whole(2)}, 6, (3, 4, 5)),
        # Both kinds of attention in every stage.
        (
            "dots3note",
            {
                "attention.sliding_window": whole(8),
                "attention.sliding_window_pattern": each(*HALF),
            },
            8,
            (2, 3, 4, 5, 6),
        ),
        # Layers that look at tokens are all in the first stage, and each needs a compressed one.
        (
            "deepseek4",
            {
                "hash_layer_count": whole(3),
                "attention.sliding_window": whole(8),
                "attention.compress_ratios": each(0, 0, 4, 128, 4, 128, 4, 128),
            },
            8,
            (3, 4, 5, 6),
        ),
        # Sizes of models that change llama.cpp's arithmetic.
        ("baichuan", {}, 32, ()),
        ("baichuan", {}, 6, (1, 2, 3, 4, 5)),
        ("command-r", {}, 64, ()),
        ("exaone4", {}, 64, ()),
        # What all layers share.
        (
            "gemma4",
            {
                "attention.sliding_window": whole(8),
                "attention.sliding_window_pattern": each(*HALF),
            },
            8,
            (2, 3, 4, 5, 6),
        ),
        ("gemma4", {"attention.shared_kv_layers": whole(4)}, 8, ()),
        ("gemma4", {"embedding_length_per_layer_input": whole(256)}, 8, ()),
    ],
)
def test_boundaries(
    architecture: str,
    told: dict[str, MetaValue],
    layers: int,
    boundaries: tuple[int, ...],
    tmp_path: Path,
) -> None:
    changes: dict[str, MetaValue | None] = {
        f"{architecture}.{suffix}": value for suffix, value in told.items()
    }
    path = describe(tmp_path / "m.gguf", changes, architecture=architecture, layers=layers)
    assert read_card(path).boundaries == boundaries


def test_a_shard_says_the_heads_of_layers_that_have_none(tmp_path: Path) -> None:
    """llama.cpp takes the size of all heads from the number in its first layer."""
    changes: dict[str, MetaValue | None] = {
        "jamba.attention.head_count": each(8, 0, 8, 0),
        "jamba.attention.head_count_kv": each(2, 0, 2, 0),
    }
    model = open_model(describe(tmp_path / "m.gguf", changes, architecture="jamba"))
    metadata = shard_recipe(model, LayerSpan(1, 4)).metadata
    assert metadata["jamba.attention.head_count"].items() == (8, 8, 8)
    assert metadata["jamba.attention.head_count_kv"].items() == (0, 2, 0)


def test_arrays_that_llama_cpp_wrote_as_long_as_can_be(tmp_path: Path) -> None:
    floats = [float(number) for number in range(MAX_LAYERS)]
    changes: dict[str, MetaValue | None] = {
        "xielu.beta": array_value(ValueType.FLOAT32, floats),
        "apertus.deepstack_mapping": array_value(ValueType.INT32, [-1] * MAX_LAYERS),
    }
    model = open_model(describe(tmp_path / "m.gguf", changes, architecture="apertus"))
    metadata = shard_recipe(model, LayerSpan(1, 3)).metadata
    assert metadata["xielu.beta"].items() == (1.0, 2.0)
    assert "apertus.deepstack_mapping" not in metadata


def test_rows_that_must_look_like_tokens_are_told_to_every_stage_of_several(
    tmp_path: Path,
) -> None:
    """Where rows are pictures to llama.cpp, the first stage overwrites a node as well."""
    node = "edgellm.shard.input_node"
    model = open_model(describe(tmp_path / "m.gguf", architecture="cogvlm"))
    assert node in shard_recipe(model, LayerSpan(0, 2)).metadata
    assert node in shard_recipe(model, LayerSpan(2, 4)).metadata
    assert node not in shard_recipe(model, LayerSpan(0, 4)).metadata
    other = open_model(describe(tmp_path / "n.gguf", architecture="gpt2"))
    assert node not in shard_recipe(other, LayerSpan(0, 2)).metadata
    assert node in shard_recipe(other, LayerSpan(2, 4)).metadata


def test_several_streams_are_one_row_and_a_first_stage_that_looks_at_tokens_knows_them(
    tmp_path: Path,
) -> None:
    changes: dict[str, MetaValue | None] = {
        "deepseek4.hyper_connection.count": whole(4),
        "deepseek4.hash_layer_count": whole(1),
        "deepseek4.attention.compress_ratios": each(4, 4, 4, 4, 4),  # one is of no layer
    }
    path = describe(tmp_path / "m.gguf", changes, architecture="deepseek4")
    card = read_card(path)
    assert card.n_embd == 4 * 2048
    assert card.first_bytes > card.inner_bytes + 32000 * 2048 // 16
    first, middle = (shard_recipe(card.model, LayerSpan(i, i + 1)) for i in (0, 1))
    size, count = "deepseek4.vocab_size", "deepseek4.hash_layer_count"
    assert [first.metadata[key].scalar() for key in (size, count)] == [32000, 1]
    assert [middle.metadata[key].scalar() for key in (size, count)] == [1, 0]
    assert middle.metadata["deepseek4.attention.compress_ratios"].items() == (4,)
    weights = sum(t.layout.nbytes for t in first.tensors)
    assert card.first_bytes + card.layers[0].weight_bytes == weights


def test_what_a_device_makes_of_such_shards(tmp_path: Path) -> None:
    """Up to what the stage process is told: rows of all streams, embeddings of one."""
    model = open_model(write_recipe(TINY_ARCHS["deepseek4"], tmp_path))
    card = read_card(model)
    shape = ModelShape(card.n_layers, card.n_embd, card.n_vocab)
    embedding = write_embedding(model, tmp_path / "embedding.gguf")
    told = []
    for first, end in ((0, 2), (2, 4)):
        span = LayerSpan(first, end)
        shard = cut(model, span, tmp_path / f"{first}.gguf")
        table = None if first else embedding
        files = stage_files(shard.path, table, digest=model.digest, span=span, shape=shape)
        request = LoadStage(
            epoch=1,
            index=first // 2,
            stage_count=2,
            first=first,
            end=end,
            layers=card.n_layers,
            model={"digest": model.digest, "engine": "llama"},
            settings=settings_to_plain(EngineSettings()),
            next_host="",
            next_port=0,
            width=card.n_embd,
            vocab=card.n_vocab,
            deadline_s=0.0,
        )
        config = stage_config(request, EngineSettings(), files)
        assert stage_config_from(stage_config_to(config, 1, 0)) == config
        told.append((config.input_node, config.fed_tokens, config.residual, config.width))
    assert told == [("embd", True, "l_last", 4 * WIDTH), ("hc_init", True, "l_last", 4 * WIDTH)]


@pytest.mark.parametrize("architecture", ["talkie", "baichuan"])
def test_the_planner_says_why_a_model_is_not_split(architecture: str, tmp_path: Path) -> None:
    """By its architecture, or by its number of layers."""
    path = describe(tmp_path / "m.gguf", architecture=architecture, layers=32)
    card = read_card(path)
    offers = [DeviceOffer(name, DeviceId(name * 64), 8 << 30) for name in "ab"]
    told = plan_for(card, offers, EngineSettings(), Epoch(1)).plan
    assert len(told.stages) == 1
    problem = card.span_problem(LayerSpan(0, 1))
    assert problem
    assert problem in told.why


def test_docs_name_every_architecture_that_runs_whole(repository: Path) -> None:
    """With its reason, word for word."""
    text = (repository / "docs" / "models.md").read_text(encoding="utf-8")
    for name, rule in ARCHITECTURES.items():
        if rule.support is Support.SOLO:
            (row,) = (line for line in text.splitlines() if f"`{name}`" in line)
            assert rule.reason in row, name
