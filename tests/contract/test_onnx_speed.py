"""What a cut costs: two stages against the uncut session, at a shape where a step takes 10 ms.

Processor time of the calling thread counts, since onnxruntime computes in it (one thread) and
other processes of the machine should not.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from edgellm.modelfile.onnx import OnnxModel, open_onnx
from tests.contract.test_onnx_exact import stages
from tests.onnxreference import WholeOnnx
from tests.tinyonnx import HEAD, write_tiny_onnx

MOST = 0.05
STEPS, LOADS = 24, 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx-grouped", "onnx-plain"])
def test_a_cut_costs_little(kind: str, tmp_path: Path) -> None:
    """The median of several loads: where the system puts the weights moves either by 5 percent."""
    model = open_onnx(
        write_tiny_onnx(kind, tmp_path / kind, width=1024, layers=10, feed_forward=3072)
    )
    ratios = []
    for _ in range(LOADS):
        uncut, cut = quickest_steps(model, tmp_path)
        print(f"{kind}: uncut {uncut * 1e3:.2f} ms a step, two stages {cut * 1e3:.2f} ms")
        assert uncut >= 0.010
        ratios.append(cut / uncut)
    assert statistics.median(ratios) <= 1 + MOST


def quickest_steps(model: OnnxModel, folder: Path) -> tuple[float, float]:
    """Seconds of a step (whole, in two stages): of each the quickest, since what else runs on the
    machine makes steps only slower. In turn, so that it meets both alike."""
    whole = WholeOnnx(model.paths[0], head=HEAD)
    runs: tuple[list[float], list[float]] = ([], [])
    with stages(model, ((0, 5), (5, 10)), folder) as row:
        decoders = (whole.decode, row.decode)
        for decode in decoders:
            decode(list(range(3, 51)))
        for token in range(STEPS):
            for decode, seconds in zip(decoders, runs, strict=True):
                began = time.thread_time()
                decode([token + 3])
                seconds.append(time.thread_time() - began)
    return min(runs[0]), min(runs[1])
