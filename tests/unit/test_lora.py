"""LoRA adapters are validated before native code sees them, weighed, and cut with their layers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from edgellm.answer import LoadOptions
from edgellm.errors import EdgeError, ModelFileError, UnsupportedModelError, UsageError
from edgellm.modelfile import open_model, read_card
from edgellm.modelfile.adapted import adapted
from edgellm.modelfile.cut import cut, write_recipe
from edgellm.modelfile.lora import adapter_recipe, open_adapter
from edgellm.modelref import OpenedModel, open_reference, with_adapters
from edgellm.planner import DeviceOffer
from edgellm.planning import plan_over
from edgellm.runtime.terms import model_of
from edgellm.store.shards import ShardFiles
from edgellm.store.shards import with_adapters as stage_adapters
from edgellm.types import DeviceId, EngineSettings, LayerSpan, RopeScaling
from edgellm.wire.messages import LoadStage
from edgellm.wire.plain import settings_to_plain
from tests.tinyadapters import write_adapter
from tests.tinymodels import write_tiny_model
from tests.tinyonnx import write_tiny_onnx
from tests.unit.test_gguf_split import split

OFFERS = [DeviceOffer(name, DeviceId(name * 64), 1 << 30) for name in ("a", "b")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("base"))


def refused(base: Path, path: Path) -> EdgeError:
    with pytest.raises(EdgeError) as caught:
        open_adapter(path, open_model(base))
    assert str(path) in caught.value.message or caught.value.field  # type: ignore[attr-defined]
    return caught.value


# --- what is no adapter of this model -------------------------------------------------


@pytest.mark.parametrize(
    ("made", "kind", "words"),
    [
        ({"metadata": {"general.type": "model"}}, UnsupportedModelError, "not a LoRA adapter"),
        ({"metadata": {"general.type": None}}, UnsupportedModelError, "not a LoRA adapter"),
        ({"metadata": {"adapter.type": "dora"}}, UnsupportedModelError, "type dora"),
        ({"metadata": {"adapter.type": None}}, UnsupportedModelError, "not a LoRA adapter"),
        ({"metadata": {"adapter.lora.alpha": "many"}, "alpha": None}, ModelFileError, "float32"),
        ({"alpha": float("nan")}, ModelFileError, "float32"),
        (
            {"metadata": {"adapter.alora.invocation_tokens": [1, 2]}},
            UnsupportedModelError,
            "activated",
        ),
        ({"architecture": "qwen2"}, ModelFileError, "'qwen2'"),
        ({"kind": "Q4_0", "rank": 32}, ModelFileError, "q4_0"),
        ({"names": []}, ModelFileError, "no tensor"),
    ],
)
def test_what_is_no_adapter_of_this_model(
    made: dict[str, Any], kind: type[EdgeError], words: str, base: Path, tmp_path: Path
) -> None:
    error = refused(base, write_adapter(base, tmp_path / "x.gguf", **made))
    assert isinstance(error, kind)
    assert words in error.message


def test_files_that_are_not_there_or_no_adapter_at_all(base: Path, tmp_path: Path) -> None:
    assert "--lora" in str(refused(base, tmp_path / "nothing.gguf"))
    assert isinstance(refused(base, base), UnsupportedModelError)
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    assert isinstance(refused(base, tmp_path / "x.gguf"), ModelFileError)


def test_adapters_of_other_shapes(base: Path, tmp_path: Path) -> None:
    """llama.cpp would find some of these out by aborting, and some by reading what is not there."""
    wider = write_tiny_model("llama-head64", tmp_path)
    adapter = write_adapter(wider, tmp_path / "wider.gguf", names=["attn_q"])
    assert "do not fit" in refused(base, adapter).message
    deeper = write_tiny_model("llama", tmp_path, layers=6)
    adapter = write_adapter(deeper, tmp_path / "deeper.gguf")
    assert "no tensor 'blk.5.attn_q.weight'" in refused(base, adapter).message
    experts = write_tiny_model("llama-moe", tmp_path)
    adapter = write_adapter(experts, tmp_path / "experts.gguf")
    assert "no tensor" in refused(base, adapter).message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"blk.0.attn_q.weight.lora_b", b"blk.0.attn_q.weight.lora_c", "no half"),
        (b"blk.0.attn_q.weight.lora_b", b"blk.1.attn_q.weight.lora_a", "twice"),
        (b"blk.0.attn_q.weight.lora_b", b"blk.0.attn_x.weight.lora_b", "both halves"),
    ],
)
def test_pairs_that_are_none(
    old: bytes, new: bytes, words: str, base: Path, tmp_path: Path
) -> None:
    path = write_adapter(base, tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(old, new))
    assert words in refused(base, path).message


def test_a_pair_whose_ranks_differ(base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "x.gguf", names=["attn_q"], layers=[0], rank=8)
    data = path.read_bytes()
    name = b"blk.0.attn_q.weight.lora_a"
    at = data.index(name) + len(name) + 4
    assert struct.unpack_from("<QQ", data, at) == (64, 8)
    path.write_bytes(data[: at + 8] + struct.pack("<Q", 4) + data[at + 16 :])
    refused(base, path)


def test_embeddings_that_are_the_head_as_well(tmp_path: Path) -> None:
    """llama.cpp would multiply the head by them, with the wrong shapes, and abort."""
    base = write_tiny_model("llama-tied", tmp_path)
    adapter = write_adapter(base, tmp_path / "x.gguf", outer=["token_embd"])
    assert "head as well" in refused(base, adapter).message


# --- what it does to a model ----------------------------------------------------------


def test_layers_weigh_what_the_adapter_adds(base: Path, tmp_path: Path) -> None:
    model = open_model(base)
    path = write_adapter(base, tmp_path / "x.gguf", layers=[1, 4], outer=["output"])
    adapter = open_adapter(path, model)
    plain = read_card(model)
    card = adapted(plain, [adapter, adapter])
    settings = EngineSettings()
    layer = sum(pair.nbytes for pair in adapter.pairs if pair.layer == 1)
    head = sum(pair.nbytes for pair in adapter.pairs if pair.layer is None)
    assert layer == 4 * 8 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 96))
    assert head == 4 * 8 * (64 + 288)

    def more(first: int, end: int) -> int:
        span = LayerSpan(first, end)
        before, after = plain.stage_memory(span, settings), card.stage_memory(span, settings)
        return after.weights - before.weights

    assert more(0, 1) == 0
    assert more(0, 2) == 2 * layer
    assert more(2, 5) == 2 * (layer + head)
    assert more(0, 5) == 2 * (2 * layer + head)
    work, less = (each.stage_work(LayerSpan(1, 2), settings, 0) for each in (card, plain))
    assert work.decode_bytes - less.decode_bytes == 2 * layer
    assert work.prefill_flops - less.prefill_flops == 2 * 2 * layer // 4
    assert sum(kind.nbytes for kind in work.by_kind) == work.decode_bytes
    assert card.boundaries == plain.boundaries


def test_embeddings_that_two_adapters_change_are_not_cut(base: Path, tmp_path: Path) -> None:
    paths = [write_adapter(base, tmp_path / f"{name}.gguf", outer=["token_embd"]) for name in "xy"]
    opened = with_adapters(open_reference(str(base)), [str(paths[0])])
    assert opened.card.boundaries == (1, 2, 3, 4)
    opened = with_adapters(open_reference(str(base)), [str(path) for path in paths])
    assert opened.card.boundaries == ()
    plan = plan_over(opened, OFFERS, LoadOptions(use_all=True))
    assert [len(stage.span) for stage in plan.stages] == [5]
    with pytest.raises(EdgeError, match=r"token embeddings.*on one device"):
        plan_over(opened, OFFERS, LoadOptions(stages="a:0-2,b:2-"))


def test_a_plan_names_its_adapters(base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "x=2.gguf")
    for text, scale in ((str(path), 1.0), (f"{path}=0.5", 0.5), (f"{path}=-1e1", -10.0)):
        opened = with_adapters(open_reference(str(base)), [text])
        plan = plan_over(opened, OFFERS, LoadOptions())
        ((digest, used),) = plan.settings.adapters
        assert (digest, used) == (opened.adapters[0].digest, scale)
        assert with_adapters(opened, [text]) is opened


@pytest.mark.parametrize("scale", ["nan", "inf", "1e9"])
def test_scales_have_bounds(scale: str, base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="scale"):
        with_adapters(open_reference(str(base)), [f"{path}={scale}"])


def test_a_name_alone_is_no_list(base: Path) -> None:
    with pytest.raises(UsageError, match="a list"):
        with_adapters(open_reference(str(base)), "adapter.gguf")


def test_cells_of_another_adapter_are_of_another_model() -> None:
    """KV pages name their model: those that were computed otherwise must not fit."""

    def named(**settings: Any) -> str:
        plain = settings_to_plain(EngineSettings(**settings))
        request = LoadStage(1, 0, 1, 0, 2, 2, {"digest": "d" * 64}, plain, "", 0, 64, 288, 1.0)
        return model_of(request)

    one, two = ("1" * 64, 1.0), ("2" * 64, 1.0)
    assert named() == named(threads=3, context=99) == "d" * 64
    others = [
        named(adapters=(one,)),
        named(adapters=(two,)),
        named(adapters=(("1" * 64, 0.5),)),
        named(adapters=(one, two)),
        named(rope_scaling=RopeScaling.YARN),
        named(rope_scale=2.0),
        named(rope_freq_base=1e6),
    ]
    assert len({named(), *others}) == 1 + len(others)
    assert others[0] == named(adapters=(one,))


def test_models_that_take_none(tmp_path: Path) -> None:
    models: list[OpenedModel] = [open_reference("stub:3")]
    write_tiny_onnx("onnx-plain", tmp_path / "m")
    models.append(open_reference(str(tmp_path / "m")))
    for opened in models:
        with pytest.raises(UsageError, match="GGUF models alone"):
            with_adapters(opened, ["x.gguf"])


# --- the part of a stage --------------------------------------------------------------


def test_a_part_is_checked_against_its_shard(base: Path, tmp_path: Path) -> None:
    model = open_model(base)
    adapter = open_adapter(write_adapter(base, tmp_path / "x.gguf", outer=["output"]), model)
    assert adapter_recipe(adapter, model, LayerSpan(0, 5)) is not None
    parts = {}
    for span in (LayerSpan(0, 2), LayerSpan(2, 5)):
        recipe = adapter_recipe(adapter, model, span)
        assert recipe is not None
        parts[span] = tmp_path / f"{span.first}.gguf"
        write_recipe(recipe, adapter.source.read, parts[span])
        files = ShardFiles(cut(model, span, tmp_path / f"shard{span.first}.gguf").path)
        made = stage_adapters(files, {0: parts[span]}, {}, [adapter.digest])
        assert dict(made.adapters) == {0: parts[span]}
        assert stage_adapters(files, {}, {}, []) is files
    for number, digests in ((0, ["0" * 64]), (1, [adapter.digest])):
        with pytest.raises(ModelFileError, match="adapter"):
            stage_adapters(files, {number: parts[span]}, {}, digests)
    with pytest.raises(ModelFileError, match=r"do not fit tensor 'output\.weight' of \[64, 1\]"):
        first = ShardFiles(tmp_path / "shard0.gguf")
        stage_adapters(first, {0: parts[LayerSpan(2, 5)]}, {}, [adapter.digest])
    with pytest.raises(UnsupportedModelError):
        stage_adapters(files, {0: files.shard}, {}, [adapter.digest])


def test_an_adapter_of_a_split_model(base: Path, tmp_path: Path) -> None:
    parts = split(base, tmp_path)
    path = write_adapter(base, tmp_path / "x.gguf")
    whole, divided = (open_adapter(path, open_model(each)) for each in (base, parts[1]))
    assert whole.digest == divided.digest
    recipe = adapter_recipe(divided, open_model(parts[0]), LayerSpan(1, 3))
    assert recipe is not None
    assert {name.split(".")[1] for name in recipe.sources} == {"1", "2"}
