"""The bench of predictions: what counts as right, and devices and links as slow as told."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.bench.cables import Cables
from edgellm.bench.setups import (
    SETUPS,
    Outcome,
    Setup,
    StagePair,
    Times,
    measure_setups,
)
from edgellm.bench.throttle import Throttles, throttles
from edgellm.cli.setuptable import setups_table
from edgellm.errors import DeviceError
from edgellm.modelref import demo_model, open_reference
from edgellm.planner import parse_objective, parse_stages
from tests.conftest import ROOT

PLACE = (sys.executable, "-m", "edgellm.bench.place")
MIB = 1 << 20


def outcome(
    told: Times,
    was: Times,
    alone: tuple[Times, Times] | None = None,
    memory: tuple[int, int] = (100 * MIB, 104 * MIB),
) -> Outcome:
    stage = StagePair("a", (0, 3), (0.01, 0.01), (0.1, 0.1), 0.001, memory)
    return Outcome(SETUPS[0], told, was, (stage,), alone)


def test_a_prediction_is_right_within_fifteen_percent_of_both_times() -> None:
    was = Times(1.0, 0.030)
    assert outcome(Times(1.14, 0.026), was).met
    assert not outcome(Times(1.16, 0.030), was).met
    assert not outcome(Times(1.0, 0.025), was).met
    assert outcome(Times(2.0, 0.06), was).errors == pytest.approx((1.0, 1.0))
    assert outcome(was, was, memory=(90, 100)).memory_error == pytest.approx(-0.1)


def test_and_where_it_says_which_is_faster() -> None:
    split, alone = Times(1.0, 0.040), Times(1.0, 0.030)
    right = outcome(split, split, (alone, alone))
    assert right.met
    wrong = outcome(split, split, (dataclasses.replace(alone, tpot_s=0.045), alone))
    assert not wrong.choice_right
    assert not wrong.met
    table = setups_table([right, wrong])
    assert "1 of 2 within 15% of TTFT and TPOT; 2 of 2 within 10% of memory." in table
    assert "which is faster was predicted WRONG" in table
    assert table.count("MISSED") == 1


def test_the_set_ups_are_told_apart_and_can_be_had() -> None:
    names = [each.name for each in SETUPS]
    assert len(names) == len(set(names)) == 10
    for each in SETUPS:
        assert 1 <= len(each.machines) <= 3
        assert sum(machine.share for machine in each.machines) <= 2  # processors, at the least
        parse_objective(each.objective)
        if each.stages is not None:
            devices = {stage.device for stage in parse_stages(each.stages)}
            assert devices == {machine.name for machine in each.machines}


# --- slow devices and slow links --------------------------------------------------------


@pytest.fixture
def throttled() -> Iterator[Throttles]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(throttles())
        except DeviceError as error:
            pytest.skip(str(error))
        yield made


def test_a_throttled_program_has_its_part_of_a_processor(throttled: Throttles) -> None:
    work = "import time\nwhile time.process_time() < 0.25: pass\nprint(time.process_time())"
    group = throttled.group("slow", 0.2)
    began = time.monotonic()
    done = subprocess.run(
        [*PLACE, "", str(group), sys.executable, "-c", work],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert float(done.stdout) / (time.monotonic() - began) < 0.35
    assert throttled.group("slow", 0.5) == group  # another set-up's device of that name
    with pytest.raises(DeviceError, match="no control group can be made"):
        throttled.group("slow/er/still", 0.5)


@pytest.fixture
def cables() -> Iterator[Cables]:
    try:
        made = Cables(2)
    except DeviceError as error:
        pytest.skip(str(error))
    try:
        yield made
    finally:
        made.remove()


def test_a_shaped_cable_is_as_slow_as_told_and_in_its_direction_alone(cables: Cables) -> None:
    receiver = textwrap.dedent("""
        import socket, sys
        with socket.create_server((sys.argv[1], 7000)) as server:
            print("ready", flush=True)
            for _ in range(2):
                connection, _ = server.accept()
                while connection.recv(1 << 16):
                    pass
                connection.close()
    """)
    sender = textwrap.dedent("""
        import socket, sys, time
        connection = socket.create_connection((sys.argv[1], 7000))
        began = time.monotonic()
        connection.sendall(bytes(200_000))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        print(time.monotonic() - began)
    """)

    def inside(number: int, *command: str) -> list[str]:
        return [*PLACE, cables.namespace(number), "", sys.executable, "-c", *command]

    there = cables.address(2)
    with subprocess.Popen(
        inside(2, receiver, there), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"

            def sending() -> float:
                done = subprocess.run(
                    inside(1, sender, there),
                    cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
                )  # fmt: skip
                return float(done.stdout)

            cables.shape(1, "4mbit")
            slow = sending()
            cables.shape(1, None)
            cables.shape(2, "4mbit")  # what the other one sends: next to nothing
            fast = sending()
        finally:
            server.kill()
    assert slow > 0.9 * 200_000 * 8 / 4e6
    assert fast < 0.7 * slow


def test_a_namespace_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PLACE, "edgellm-nowhere", "", "true"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1


@pytest.mark.slow
def test_a_whole_set_up(tmp_path: Path) -> None:
    """In a process of its own: it moves into another network for good."""
    code = textwrap.dedent("""
        import asyncio
        from tests.unit.test_setups import play
        asyncio.run(play())
    """)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("halves 2 ")


async def play() -> None:
    """Two devices that share the demo model; prints how many stages there were."""
    setup: Setup = next(each for each in SETUPS if each.name == "halves")
    small = dataclasses.replace(setup, stages="a:0-4,b:4-", prompt=96)
    (one,) = await measure_setups(open_reference(demo_model()), [small], lambda line: None)
    sane = 0 < one.measured.tpot_s < 10 and 0 < one.predicted.tpot_s < 10
    print(one.setup.name, len(one.stages), sane and abs(one.memory_error) < 1)
