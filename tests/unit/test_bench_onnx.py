"""The bench of cut ONNX models: its model, its runners, and what it makes of their times."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.bench.onnxcut import TARGET, OnnxCutReport, measure_onnx_cut
from edgellm.bench.onnxmodel import write_decoder
from edgellm.cli.benchtables import onnx_table
from edgellm.errors import UsageError
from edgellm.modelfile.onnx import open_onnx
from edgellm.types import LayerSpan
from tests.tinyonnx import write_tangled_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
LAYERS = 3


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bench's own model, made small."""
    folder = tmp_path_factory.mktemp("decoder")
    return write_decoder(folder, layers=LAYERS, width=128, feed_forward=192, vocabulary=300)


def test_the_model_of_the_bench_and_its_runners(graph: Path, tmp_path: Path) -> None:
    from edgellm.bench.onnxrunners import EngineRow, PlainSession, timed

    model = open_onnx(graph)
    assert sorted(model.cuts) == [1, 2]
    _, wanted = timed(PlainSession(str(graph)), 8)
    spans = [LayerSpan(0, 1), LayerSpan(1, LAYERS)]
    for row in ([LayerSpan(0, LAYERS)], spans):
        assert timed(EngineRow(model, row, tmp_path), 8)[1] == wanted
    # negative control: a layer left out says something else
    assert timed(EngineRow(model, [spans[0], LayerSpan(2, LAYERS)], tmp_path), 8)[1] != wanted


async def test_a_whole_run(graph: Path, tmp_path: Path) -> None:
    report = await measure_onnx_cut(graph.parent, 1, lambda words: None, loads=1)
    assert report.layers == (1, LAYERS)
    assert all(seconds > 0 for steps in report.steps_s.values() for seconds in steps)
    assert not report.met  # a step of so small a model says nothing
    with pytest.raises(UsageError, match="cannot be cut"):
        await measure_onnx_cut(write_tangled_onnx(tmp_path), 1, lambda words: None)


@pytest.mark.parametrize(("cut", "met"), [(0.0209, True), (0.0212, False)])
def test_what_is_made_of_the_times(cut: float, met: bool) -> None:
    steps = {"plain": (0.02, 0.02, 0.2), "whole": (0.02, 0.02, 0.2), "cut": (cut, cut, 0.21)}
    report = OnnxCutReport((4, 8), steps)
    assert report.ratio("whole") == pytest.approx(cut / 0.02)  # the third run was disturbed
    assert report.met is met
    assert report.to_dict()["target"] == TARGET
    assert ("NOT MET" in onnx_table(report)) is not met
