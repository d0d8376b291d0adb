"""The synthetic block is a valid GGUF of the shape and size that it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import DeviceError
from edgellm.modelfile import read_card
from edgellm.modelfile.gguf import read_header
from edgellm.planner import MEASURED_KINDS
from edgellm.probe.synthetic import BARE, BlockShape, shape_for, shape_of_kind, write_block

MIB = 1 << 20
SMALL = BlockShape(width=512, feed_forward=1536, layers=2)


def test_the_file_is_what_the_shape_says(tmp_path: Path) -> None:
    path = tmp_path / "block.gguf"
    write_block(path, SMALL)
    header = read_header(path)
    matrices = [t for t in header.tensors if t.type.name in ("q4_K", "q6_K")]
    assert sum(t.nbytes for t in matrices) == SMALL.weight_bytes
    assert sum(t.shape[0] * t.shape[1] for t in matrices) == SMALL.weights
    fine = sorted(t.name for t in matrices if t.type.name == "q6_K")
    assert fine == ["blk.0.attn_v.weight", "blk.0.ffn_down.weight"]
    rest = path.stat().st_size - SMALL.weight_bytes
    assert 0 < rest < 64 << 10
    assert read_card(path).n_layers == SMALL.layers


def test_weights_are_small_numbers_around_zero(tmp_path: Path) -> None:
    """Else rows overflow within a few layers, and infinities are computed at another speed."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    path = tmp_path / "block.gguf"
    write_block(path, SMALL)
    for tensor in read_header(path).tensors:
        if tensor.type.name in ("q4_K", "q6_K"):
            data = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
            values = quants.dequantize(data, GGMLQuantizationType(tensor.type.id))
            assert np.isfinite(values).all()
            assert abs(float(values.mean())) < 0.005
            assert 0.01 < float(values.std()) < 0.05


@pytest.mark.parametrize("kind", MEASURED_KINDS)
def test_a_block_of_a_single_type(tmp_path: Path, kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    shape = shape_of_kind(kind, 0)
    path = tmp_path / "block.gguf"
    write_block(path, shape)
    tensors = [one for one in read_header(path).tensors if len(one.shape) == 2 and one.shape[1] > 1]
    assert {one.type.name for one in tensors} == {kind}
    assert sum(one.nbytes for one in tensors) == shape.weight_bytes
    for one in tensors[:3]:
        data = np.fromfile(path, np.uint8, one.nbytes, offset=one.offset)
        values = quants.dequantize(data, GGMLQuantizationType(one.type.id))
        assert abs(float(values.mean())) < 0.005
        assert 0.01 < float(values.std()) < 0.05


@pytest.mark.pure
def test_blocks_of_single_types_exceed_the_cache_and_fit_the_memory() -> None:
    for kind in MEASURED_KINDS:
        assert shape_of_kind(kind, 4 << 30, 32 * MIB).weight_bytes > 2 * 32 * MIB
        assert shape_of_kind(kind, 4 << 30, 1 << 30).layers <= 12
        assert shape_of_kind(kind, 200 * MIB, 1 << 30).weight_bytes <= 200 * MIB
        assert shape_of_kind(kind, 0).weight_bytes < 16 * MIB


def test_the_mixture_is_that_of_q4_k_m() -> None:
    """TinyLlama's 22 layers hold 0.595 bytes a weight."""
    shape = shape_for(1 << 40)
    assert shape.weight_bytes / shape.weights == pytest.approx(576446464 / 968884224, rel=0.01)


def test_a_usual_machine_gets_more_than_its_caches_hold() -> None:
    assert 96 * MIB < shape_for(4 << 30).weight_bytes < 128 * MIB
    assert shape_for(4 << 30, 96 * MIB).weight_bytes > 2 * 96 * MIB
    assert shape_for(4 << 30, 1 << 30).weight_bytes < 400 * MIB  # but a probe stays short


@pytest.mark.pure
@given(st.integers(0, 1 << 42), st.integers(0, 1 << 32))
def test_memory_is_respected(memory_bytes: int, cache_bytes: int) -> None:
    shape = shape_for(memory_bytes, cache_bytes)
    assert shape.weight_bytes <= max(memory_bytes * 1.05, 5 * MIB)
    assert shape.weight_bytes < 400 * MIB
    assert shape.layers >= 2
    for tensor in shape.matrices():
        assert tensor.shape[0] % 256 == 0


def test_an_empty_step_has_next_to_no_weights() -> None:
    assert BARE.weight_bytes < MIB


def test_a_folder_that_takes_nothing_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot write"):
        write_block(tmp_path / "missing" / "block.gguf", BARE)
