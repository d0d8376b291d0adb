"""ONNX files that lie: a typed error that names the field, and nothing reaches onnxruntime.

Beside them the reader against the ``onnx`` package, which is its oracle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.answer import LoadOptions
from edgellm.errors import EdgeError, ModelFileError, SplitError, UnsupportedModelError, UsageError
from edgellm.modelfile.cut import write_shard
from edgellm.modelfile.onnx import OnnxCard, onnx_recipe, open_onnx, open_stage
from edgellm.modelfile.onnx.protobuf import put_bytes, put_integer, put_varint
from edgellm.modelref import open_reference
from edgellm.planner import DeviceOffer
from edgellm.planning import explain
from edgellm.types import DeviceId, EngineSettings, LayerSpan
from tests.tinyonnx import KINDS, LAYERS, write_tangled_onnx, write_tiny_onnx

onnx: Any = pytest.importorskip("onnx")
Change = Callable[[Any], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_onnx("onnx-grouped", tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, change: Change) -> Path:
    """The model with its graph changed; its data file stays as it is."""
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, kind: type[EdgeError] = ModelFileError) -> ModelFileError:
    with pytest.raises(kind) as found:
        open_onnx(path)
    error = found.value
    assert isinstance(error, ModelFileError)
    assert error.exit_code == 5
    assert error.field
    return error


# --- the oracle -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_onnx_package_reads(kind: str, tmp_path: Path) -> None:
    path = write_tiny_onnx(kind, tmp_path)
    model = open_onnx(path)
    proto = onnx.load(str(path))
    assert len(model.decoder.graph.nodes) == len(proto.graph.node)
    assert [put.name for put in proto.graph.input] == list(model.decoder.graph.inputs)
    assert [put.name for put in proto.graph.output] == list(model.decoder.graph.outputs)
    seen = 0
    for index, (name, tensor) in enumerate(model.decoder.graph.initializers.items()):
        wanted = onnx.numpy_helper.to_array(proto.graph.initializer[index])
        assert (name, tensor.dims) == (proto.graph.initializer[index].name, wanted.shape)
        if f"t{index}" in model.tensors:
            assert model.read(f"t{index}") == wanted.tobytes()
            seen += 1
        else:
            assert tensor.inline == wanted.tobytes()
    assert seen > LAYERS


def test_a_stage_is_a_valid_model(folder: Path) -> None:
    """The ``onnx`` package finds nothing wrong with what is written."""
    model = open_onnx(folder)
    for span in (LayerSpan(0, 2), LayerSpan(2, 3), LayerSpan(3, LAYERS), LayerSpan(0, LAYERS)):
        made = onnx.load_from_string(model.stage(span).body)
        assert made.graph.node
        assert len(made.graph.output) == 1 + 2 * len(span)
        made_by = {name for node in made.graph.node for name in node.output}
        assert {put.name for put in made.graph.output} <= made_by


def test_stages_share_no_layer_and_miss_none(folder: Path) -> None:
    model = open_onnx(folder)
    parts = [{w.key for w in model.stage(LayerSpan(i, i + 1)).weights} for i in range(LAYERS)]
    assert set().union(*parts) == set(model.tensors)
    common = set.intersection(*parts)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            # rotary caches are everybody's; a norm that is cut in two has its scale on both sides
            assert all(model.tensors[key].info.nbytes <= 65536 for key in (one & other) - common)


# --- external data --------------------------------------------------------------------


def relocate(name: str) -> Change:
    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name

    return change


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "a/../../outside",
        "..",
        "",
        ".",
        "./model.onnx.data",
        "C:\\secret",
        "a\\b",
        "file:///etc/passwd",
        "a\x00b",
        "sub//model.onnx.data",
    ],
)
def test_a_file_elsewhere_is_refused(name: str, folder: Path) -> None:
    (folder.parent / "outside").write_bytes(bytes(1 << 20))
    assert "location" in str(refused(changed(folder, relocate(name))).field)


def test_a_link_is_refused(folder: Path) -> None:
    data = folder / "model.onnx.data"
    real = data.rename(folder.parent / "outside")
    data.symlink_to(real)
    assert "link" in refused(folder / "model.onnx").message
    data.unlink()
    (folder / "inner").symlink_to(folder.parent, target_is_directory=True)
    path = changed(folder, relocate("inner/outside"))
    assert "link" in refused(path).message


def test_a_graph_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.onnx").symlink_to(folder / "model.onnx")
    assert "link" in refused(tmp_path / "linked" / "model.onnx").message


def test_what_is_no_file_is_refused(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        open_onnx(folder)
    os.mkfifo(folder / "model.onnx.data")
    assert "no file" in refused(folder / "model.onnx").message


def test_data_that_is_too_short_is_refused(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "offset" in str(refused(folder / "model.onnx").field)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("offset", "-1", "offset"),
        ("offset", "1e3", "offset"),
        ("offset", "9" * 30, "offset"),
        ("offset", "\u0663", "offset"),
        ("length", "1", "length"),
        ("length", "-5", "length"),
        ("basepath", "/", "external_data"),
        ("surprise", "1", "external_data"),
    ],
)
def test_entries_that_lie_are_refused(key: str, value: str, field: str, folder: Path) -> None:
    def change(model: Any) -> None:
        entries = model.graph.initializer[0].external_data
        for entry in entries:
            if entry.key == key:
                entry.value = value
                return
        entries.add(key=key, value=value)

    assert field in str(refused(changed(folder, change)).field)


def test_only_the_weights_of_the_graph_may_name_files(folder: Path) -> None:
    def change(model: Any) -> None:
        hidden = onnx.helper.make_tensor("x", onnx.TensorProto.FLOAT, [1], [1.0])
        del hidden.float_data[:]
        hidden.data_location = onnx.TensorProto.EXTERNAL
        hidden.external_data.add(key="location", value="../../secret")
        inner = onnx.helper.make_graph([], "inner", [], [], initializer=[hidden])
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))

    assert "names a file" in refused(changed(folder, change), UnsupportedModelError).message


# --- graphs ---------------------------------------------------------------------------


def test_sizes_that_do_not_fit_their_shapes_are_refused(folder: Path) -> None:
    def longer(model: Any) -> None:
        model.graph.initializer[0].dims[0] += 1

    refused(changed(folder, longer))

    def endless(model: Any) -> None:
        model.graph.initializer[0].dims[:] = [1 << 39] * 5

    refused(changed(folder, endless))

    def negative(model: Any) -> None:
        model.graph.initializer[0].dims[0] = -1

    assert "dims" in str(refused(changed(folder, negative)).field)


def test_a_graph_without_layers_is_refused(folder: Path) -> None:
    def change(model: Any) -> None:
        for put in model.graph.input:
            put.name = put.name.replace("past", "was")
        for node in model.graph.node:
            node.input[:] = [name.replace("past", "was") for name in node.input]
        kept = [put for put in model.graph.output if put.name == "logits"]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    assert "no layers" in refused(changed(folder, change), UnsupportedModelError).message


def test_a_graph_of_something_else_is_refused(folder: Path) -> None:
    def change(model: Any) -> None:
        for node in model.graph.node:
            node.input[:] = ["pixels" if name == "input_ids" else name for name in node.input]
        for put in model.graph.input:
            put.name = "pixels" if put.name == "input_ids" else put.name

    assert "input_ids" in refused(changed(folder, change), UnsupportedModelError).message


@pytest.mark.parametrize("operator", ["EPContext", "Surprise"])
def test_other_peoples_operators_are_refused(operator: str, folder: Path) -> None:
    def change(model: Any) -> None:
        model.graph.node[0].op_type = operator
        model.graph.node[0].domain = "com.microsoft" if operator == "EPContext" else "evil"

    assert operator in refused(changed(folder, change), UnsupportedModelError).message


def test_a_graph_in_disorder_is_refused(folder: Path) -> None:
    def backwards(model: Any) -> None:
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    assert "nothing before" in refused(changed(folder, backwards)).message


def test_two_makers_of_one_name_are_refused(folder: Path) -> None:
    def change(model: Any) -> None:
        model.graph.node[1].output[0] = model.graph.node[0].output[0]

    refused(changed(folder, change))


def test_graphs_within_graphs_end_somewhere(folder: Path) -> None:
    def change(model: Any) -> None:
        inner = onnx.helper.make_graph([], "g", [], [])
        for _ in range(20):
            node = onnx.helper.make_node("If", [], ["x"])
            node.attribute.append(onnx.helper.make_attribute("then_branch", inner))
            inner = onnx.helper.make_graph([node], "g", [], [])
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))

    assert "deep" in refused(changed(folder, change)).message


def test_layers_that_meet_again_cannot_be_cut(tmp_path: Path) -> None:
    """Nothing narrow is between any two layers: no boundary, each with its reason."""
    model = open_onnx(write_tangled_onnx(tmp_path))
    assert not model.cuts
    assert set(model.uncut) == set(range(1, model.layers))
    assert any("more than 4 tensors" in reason for reason in model.uncut.values())
    card = OnnxCard(model)
    assert card.boundaries == ()
    whole = LayerSpan(0, model.layers)
    assert card.span_problem(whole) is None
    assert card.stage_memory(whole, EngineSettings()).total > 0
    assert card.stage_work(whole, EngineSettings(), 0).decode_bytes > 0
    for layer, reason in model.uncut.items():
        with pytest.raises(SplitError) as found:
            model.stage(LayerSpan(0, layer))
        assert reason in found.value.message
        with pytest.raises(SplitError):
            onnx_recipe(model, LayerSpan(layer, model.layers))


def test_noise_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for noise in (
        b"",
        b"\x00",
        b"GGUF" + bytes(64),
        b"\xff" * 100,
        put_integer(1, 8),
        put_varint(7 << 3 | 2) + put_varint(1 << 62),
        put_integer(1, 8) + put_bytes(8, b"") + put_bytes(7, b"\x0a" * 5000),
        put_integer(1, 8) + put_bytes(8, b"") + put_bytes(7, put_bytes(5, b"\x08" * 9)),
    ):
        path.write_bytes(noise)
        began = time.process_time()
        refused(path)
        assert time.process_time() - began < 1.0


def test_a_huge_graph_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    node = put_varint(1 << 3 | 2) + put_varint(1 << 33)
    head = put_integer(1, 8) + put_bytes(8, b"")
    graph = put_varint(7 << 3 | 2) + put_varint(len(node) + (1 << 33)) + node
    with path.open("wb") as file:
        file.write(head + graph)
        file.truncate(len(head) + len(graph) + (1 << 33))
    assert "MiB" in refused(path).message


# --- folders --------------------------------------------------------------------------


def test_folders_and_their_files(folder: Path) -> None:
    assert open_reference(str(folder)).digest == open_reference(str(folder / "model.onnx")).digest
    (folder / "config.json").write_text("[]")
    assert "config.json" in str(refused(folder).field)
    (folder / "config.json").write_text('{"max_position_embeddings": -3, "hidden_size": "x"}')
    assert open_onnx(folder).folder.context == 2048
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert open_reference(str(folder)).chat_template == "{{ messages }}"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tool", "template": "t"},'
        ' {"name": "default", "template": "d"}]}'
    )
    assert open_reference(str(folder)).chat_template == "d"
    (folder / "model.onnx").rename(folder / "one.onnx")
    (folder / "two.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"one\.onnx, two\.onnx"):
        open_reference(str(folder))
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(ModelFileError, match=r"no \.onnx file"):
        open_reference(str(empty))


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0", "f32"])
def test_a_kv_type_that_the_graph_does_not_have(kv_type: str, folder: Path) -> None:
    """The graph fixes the type of its cells: another one is refused, not passed over."""
    opened = open_reference(str(folder))
    offers = [DeviceOffer("a", DeviceId("a"), 1 << 30)]
    with pytest.raises(UsageError, match=f"itself.*Leave --kv-type {kv_type} out"):
        explain(opened, offers, LoadOptions(kv_type=kv_type))
    assert explain(opened, offers, LoadOptions()).plan.stages[0].device == "a"


# --- shards ---------------------------------------------------------------------------


def test_a_shard_that_lies_is_refused(folder: Path, tmp_path: Path) -> None:
    model = open_onnx(folder)
    path = tmp_path / "shard.gguf"
    write_shard(onnx_recipe(model, LayerSpan(1, 3)), model.read, path)
    stage = open_stage(path)
    assert [each.width for each in stage.shape.inlets] == [64]
    raw = path.read_bytes()
    at = raw.index(b'"inlets"')
    for wrong in (
        raw[:at] + b'"INLETS"' + raw[at + 8 :],
        raw.replace(b'"side":["attention_mask"]', b'"side":["attention_masX"]'),
        raw.replace(b'"weights":[["t', b'"weights":[["u', 1),
        raw.replace(b"GroupQueryAttention", b"GroupQueryAttentioX", 1).replace(
            b"com.microsoft", b"com.macrosoft"
        ),
    ):
        assert wrong != raw
        path.write_bytes(wrong)
        with pytest.raises(ModelFileError):
            open_stage(path)


def test_what_a_card_says(folder: Path) -> None:
    model = open_onnx(folder)
    card = OnnxCard(model)
    settings = EngineSettings(context=128, sequences=2, chunk=16)
    assert (card.n_embd, card.n_vocab, card.n_layers) == (64, 288, LAYERS)
    assert card.boundaries == (1, 2, 3, 4)
    spans = [LayerSpan(i, i + 1) for i in range(LAYERS)]
    works = [card.stage_work(span, settings, 100) for span in spans]
    whole = card.stage_work(LayerSpan(0, LAYERS), settings, 100)
    assert whole.decode_bytes == sum(work.decode_bytes for work in works)
    assert whole.head_bytes == 64 * 288 * 4 == works[-1].head_bytes
    assert works[0].head_bytes == 0
    # attention 64 x (128 + 64), feed-forward 3 x 64 x 96, norms: float32
    layer = 4 * (64 * (128 + 64) + 3 * 64 * 96)
    assert layer <= whole.decode_bytes / LAYERS <= layer + 2048
    assert works[2].scan_bytes == 100 * 2 * 2 * 16 * 4
    memory = card.stage_memory(LayerSpan(1, 3), settings)
    assert memory.kv == 2 * 2 * 2 * 128 * 2 * 16 * 4
    assert np.isclose(memory.weights, 2 * layer + 65536, rtol=0.02)  # rotary tables too
