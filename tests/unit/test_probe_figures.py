"""Figures: what comes from others is believed only within bounds; arithmetic on timings."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.probe.figures import (
    DeviceFigures,
    Timings,
    better_figures,
    figures_of,
    relative_spread,
    undisturbed,
)

pytestmark = pytest.mark.pure

FIGURES = DeviceFigures(
    decode_bytes_per_s=2.3e10,
    prefill_flops_per_s=2.05e11,
    step_overhead_s=3.3e-5,
    disk_bytes_per_s=1.2e9,
    measured_at=1.79e9,
    spread=0.02,
    threads=4,
    plain_weights=True,
)
NAMES = [field.name for field in dataclasses.fields(DeviceFigures)]

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(min_value=10**300, max_value=10**400),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def test_there_and_back() -> None:
    plain = FIGURES.to_plain()
    assert set(plain) == set(NAMES)
    assert DeviceFigures.from_plain(json.loads(json.dumps(plain))) == FIGURES
    assert FIGURES.complete


def test_what_is_not_known_is_absent() -> None:
    assert DeviceFigures().to_plain() == {}
    assert DeviceFigures.from_plain({}) == DeviceFigures()
    assert not DeviceFigures().complete
    without_disk = dataclasses.replace(FIGURES, disk_bytes_per_s=None)
    assert "disk_bytes_per_s" not in without_disk.to_plain()
    assert without_disk.complete
    assert not dataclasses.replace(FIGURES, step_overhead_s=None).complete


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, -1e-9, 1e30, 10**400, True, "1e9", None, [1.0]]
)
def test_a_lie_costs_its_own_figure_alone(name: str, value: object) -> None:
    read = DeviceFigures.from_plain({**FIGURES.to_plain(), name: value})
    assert getattr(read, name) == getattr(DeviceFigures(), name)
    assert dataclasses.replace(read, **{name: getattr(FIGURES, name)}) == FIGURES


@pytest.mark.parametrize("name", ["decode_bytes_per_s", "prefill_flops_per_s", "disk_bytes_per_s"])
def test_a_rate_of_nothing_is_no_rate(name: str) -> None:
    """A plan divides by it."""
    assert getattr(DeviceFigures.from_plain({name: 0}), name) is None


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES))
def test_anything_reads_as_finite_figures(plain: dict[str, Any]) -> None:
    read = DeviceFigures.from_plain(plain)
    for name in NAMES:
        value = getattr(read, name)
        assert value is None or (type(value) in (int, float, bool) and math.isfinite(value))
        assert value is None or value >= 0
    for name in NAMES[:4]:
        assert getattr(read, name) is None or getattr(read, name) > 0
    assert DeviceFigures.from_plain(read.to_plain()) == read


# --- arithmetic -----------------------------------------------------------------------


def timings(**changes: Any) -> Timings:
    usual = Timings(
        weight_bytes=100_000_000,
        weights=160_000_000,
        chunk=64,
        steps=(0.0101, 0.0101, 0.5, 0.0101, 0.0101),
        chunks=(0.1001, 0.1001, 3.0),
        bare_steps=(0.0001, 0.0001, 0.01),
    )
    return dataclasses.replace(usual, **changes)


def test_figures_are_of_undisturbed_calls_less_the_overhead() -> None:
    found = figures_of(timings(), disk_bytes_per_s=None, threads=2, now=5.0)
    assert found.step_overhead_s == 0.0001
    assert found.decode_bytes_per_s == pytest.approx(1e10, rel=1e-3)
    assert found.prefill_flops_per_s == pytest.approx(2 * 160e6 * 64 / 0.1, rel=1e-3)
    assert (found.disk_bytes_per_s, found.measured_at, found.threads) == (None, 5.0, 2)


def test_an_overhead_above_the_step_does_not_make_a_device_infinitely_fast() -> None:
    found = figures_of(timings(bare_steps=(1.0,)), disk_bytes_per_s=1e9, threads=1, now=5.0)
    assert found.decode_bytes_per_s == pytest.approx(100e6 / 0.00101, rel=1e-3)
    assert DeviceFigures.from_plain(found.to_plain()) == found


@pytest.mark.parametrize(
    ("chunk_s", "step_s", "plain"),
    [
        (0.06, 0.0101, True),  # prompts faster, answers the same
        (0.06, 0.0110, False),  # prompts faster, answers slower
        (0.099, 0.0101, False),  # as good as the same: llama.cpp's own way
        (0.2, 0.0080, False),  # prompts slower
    ],
)
def test_plain_weights_must_win_and_cost_nothing(
    chunk_s: float, step_s: float, plain: bool
) -> None:
    other = timings(chunks=(chunk_s,) * 3, steps=(step_s,) * 5)
    found = better_figures(timings(), other, disk_bytes_per_s=None, threads=2, now=5.0)
    assert found.plain_weights is plain
    chosen = other if plain else timings()
    usual = figures_of(chosen, disk_bytes_per_s=None, threads=2, now=5.0)
    assert found.prefill_flops_per_s == usual.prefill_flops_per_s
    assert DeviceFigures.from_plain(found.to_plain()) == found


def test_what_disturbs_the_half_of_all_calls_is_left_out() -> None:
    assert undisturbed([3.0]) == 3.0
    assert undisturbed([1.0, 1.0, 1.0, 9.0, 9.0, 9.0]) == 1.0
    assert 1.0 < undisturbed([1.0, 2.0, 2.0, 2.0, 2.0]) <= 2.0  # one lucky call is not believed


def test_spread() -> None:
    assert relative_spread([1.0, 2.0, 3.0]) == 0.0
    assert relative_spread([1.0] * 9) == 0.0
    assert relative_spread([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]) > 0.5
