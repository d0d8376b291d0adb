"""What benches do with figures: pairs, cuts, traffic, and what they say of it."""

from __future__ import annotations

import math
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench.control import Control
from edgellm.bench.pairs import Case, Pair, Result, context_for, fitting, in_turn
from edgellm.bench.plain import shares
from edgellm.bench.rpc import Load, Loads, RpcReport, TokenBytes
from edgellm.bench.traffic import connections_to, traffic
from edgellm.cli.benchtables import control_table, rpc_table
from edgellm.types import DeviceId, Epoch, LayerSpan, Plan, Stage

SLOWER = Case("decode", 32, 64, "tpot_s", 1.10, speedup=False)
FASTER = Case("prefill 512", 512, 1, "ttft_s", 1.40, speedup=True)


def test_a_ratio_is_the_median_of_the_pairs_ratios_and_not_of_the_times() -> None:
    # The third pair ran on a machine ten times as slow: its ratio counts, its times do not.
    pairs = tuple(Pair(y, o, 0.0, 0.0) for y, o in ((1.0, 1.05), (1.0, 1.2), (10.0, 10.8)))
    slower = Result(SLOWER, pairs)
    assert slower.ratio == pytest.approx(1.08)
    assert slower.met
    faster = Result(FASTER, pairs)
    assert faster.ratio == pytest.approx(1 / 1.08)
    assert not faster.met


@pytest.mark.parametrize(
    ("ours", "slower_met", "faster_met"), [(1.1, True, False), (0.7, True, True)]
)
def test_the_side_of_the_target_depends_on_the_ratio(
    ours: float, slower_met: bool, faster_met: bool
) -> None:
    pairs = (Pair(1.0, ours, 0.0, 0.0),)
    assert Result(SLOWER, pairs).met is slower_met
    assert Result(FASTER, pairs).met is faster_met


async def test_in_every_other_pair_the_second_begins() -> None:
    begun: list[str] = []

    async def first() -> int:
        begun.append("first")
        return 1

    async def second() -> int:
        begun.append("second")
        return 2

    assert [await in_turn(number, first, second) for number in range(2)] == [(1, 2)] * 2
    assert begun == ["first", "second", "second", "first"]


def test_a_case_needs_no_cell_for_its_last_token_and_contexts_are_multiples_of_256() -> None:
    assert (SLOWER.cells, FASTER.cells) == (95, 512)
    assert context_for([SLOWER]) == 256
    assert context_for([SLOWER, FASTER]) == 512


def test_a_case_that_the_context_is_too_short_for_is_left_out_and_named() -> None:
    told: list[str] = []
    assert fitting((SLOWER, FASTER), 511, told.append) == (SLOWER,)
    assert len(told) == 1
    assert "prefill 512" in told[0]


@given(st.data())
def test_shares_put_every_layer_where_the_plan_has_it(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 200))
    inner = data.draw(st.sets(st.integers(1, max(1, layers - 1)), max_size=15))
    ends = [*sorted(inner - {layers}), layers]
    placed = [_device_by_llama(shares(ends), layer, layers) for layer in range(layers + 1)]
    expected = [
        next(index for index, end in enumerate(ends) if layer < end) for layer in range(layers)
    ]
    assert placed == [*expected, len(ends) - 1]  # the output goes with the last layers


def _device_by_llama(split: list[float], layer: int, layers: int) -> int:
    """llama.cpp's rule, in its own precision (``load_tensors`` in llama-model.cpp)."""
    sums = np.cumsum(np.array(split, np.float32), dtype=np.float32)
    borders = sums / sums[-1]
    return int(np.searchsorted(borders, np.float32(layer) / np.float32(layers + 1), side="right"))


def test_traffic_is_what_went_over_the_connections_to_those_ports() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as another,
    ):
        port = server.getsockname()[1]
        with (
            socket.create_connection(server.getsockname()) as counted,
            socket.create_connection(another.getsockname()),
            server.accept()[0] as far,
        ):
            found = connections_to({port})
            if not found:
                pytest.skip("this system does not tell a process's connections")
            try:
                assert [each.getpeername()[1] for each in found] == [port]
                before = traffic(found)
                counted.sendall(bytes(1000))
                assert len(far.recv(1000, socket.MSG_WAITALL)) == 1000
                far.sendall(bytes(70))  # it also acknowledges the 1000
                assert len(counted.recv(70, socket.MSG_WAITALL)) == 70
                moved = traffic(found).since(before)
                assert (moved.sent, moved.received) == (1000, 70)
            finally:
                for each in found:
                    each.close()


# --- what is said -----------------------------------------------------------------------


def _report(again_s: float, same_kernels: bool = True) -> RpcReport:
    stages = (
        Stage("a", DeviceId("a" * 64), LayerSpan(0, 13), 1),
        Stage("b", DeviceId("b" * 64), LayerSpan(13, 22), 1),
    )
    return RpcReport(
        results=(Result(FASTER, (Pair(3.0, 2.0, 1.5, 40.0),)),),
        loads=Loads(
            rpc_first=Load(2.0, 640_000_000),
            rpc_again=(Load(1.0, 625_000_000),) * 3,
            rpc_cached=(Load(0.8, 100_000_000),),
            ours_first=Load(3.0, 650_000_000),
            ours_again=(Load(again_s, 2000),),
        ),
        token_bytes=TokenBytes(rpc=160_000.0, ours=4_000.0),
        best_chunk=128,
        plan=Plan(Epoch(1), 22, stages),
        same_kernels=same_kernels,
    )


def test_the_comparison_says_ratios_targets_bytes_and_where_it_was_cut() -> None:
    text = rpc_table(_report(0.1))
    line = next(line for line in text.splitlines() if line.startswith("prefill 512"))
    assert "1.500" in line
    assert line.endswith(">= 1.40 met")
    again = next(line for line in text.splitlines() if line.startswith("load, again"))
    assert again.split()[2:] == ["1000", "100", "10.000", ">=", "5.00", "met"]
    assert "Layers 0-12 and 13-21" in text
    assert "625.0 MB over RPC" in text
    assert "5.0 s" in text  # 625 MB at a gigabit a second
    moved = next(line for line in text.splitlines() if line.startswith("bytes/token"))
    assert moved.split() == ["bytes/token", "160000", "4000", "40.0"]
    assert "Not the same kernels" not in text


def test_a_load_that_is_not_five_times_as_fast_is_not_met() -> None:
    assert "NOT MET" in rpc_table(_report(0.21))
    assert not _report(0.21).loads.met


def test_builds_with_other_kernels_are_told() -> None:
    assert "Not the same kernels" in rpc_table(_report(0.1, same_kernels=False))


def test_json_has_what_the_table_has() -> None:
    data = _report(0.1).to_dict()
    assert data["loads"]["ratio"] == pytest.approx(10.0)
    assert data["loads"]["rpc_again_bytes"] == 625_000_000
    assert data["bytes_per_token"] == {"rpc": 160000.0, "ours": 4000.0}
    assert data["layers"] == [[0, 13], [13, 22]]


def test_the_control_is_a_ratio_above_one_where_two_get_in_each_others_way() -> None:
    control = Control(SLOWER, alone_s=(0.02, 0.02, 0.02), together_s=(0.021, 0.022, 0.04))
    assert math.isclose(control.ratio, 1.1)
    assert "1.100" in control_table([control])
    assert "2.000" in control_table([control])  # the spread is shown
