"""Faults of the network between real nodes: cables that are pulled, multicast that is lost, and
devices of others on the same LAN. Devices on machines of their own, in network namespaces."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lan import (
    FIND_WITHIN_S,
    PORT,
    START_WITHIN_S,
    Lan,
    Machine,
    Node,
    all_find_all,
    wait,
)
from tests.cluster.processes import pair_homes

STORIES = "stories260K-f32.gguf"
NOTICED_WITHIN_S = 6.0
LOADED_S = 1.0
"""More than a bound, because other tests may run on the same processors."""
TOKENS = 400
AFTER_TOKENS = 20


@dataclass
class Asked:
    """An answer as the asker tells it."""

    tokens: list[int]
    at: list[float]
    """When each came, by the monotonic clock."""
    end: dict[str, Any]

    @property
    def longest_wait(self) -> tuple[float, float]:
        """(when the longest time without a token began, how long it was)."""
        waits = [(self.at[i], self.at[i + 1] - self.at[i]) for i in range(len(self.at) - 1)]
        return max(waits, key=lambda each: each[1])


class Asking:
    """The device x asks for an answer over a, b and c."""

    def __init__(self, lan: Lan, machine: Machine, folder: Path, model: Path) -> None:
        asked = {
            "home": str(folder / "x"),
            "peers": [f"10.77.0.{number}:{PORT}" for number in (1, 2, 3)],
            "model": str(model),
            "stages": "a:0-2,b:2-4,c:4-5",
            "prompt": "Once upon a time",
            "context": 512,
            "tokens": TOKENS,
        }
        command = [sys.executable, "-m", "tests.cluster.asker", json.dumps(asked)]
        self._node = lan.begin(machine, "x", command)

    def tokens(self) -> int:
        """So many are there."""
        if self._node.process.poll():
            pytest.fail(self._node.said())
        return self._node.out.read_bytes().count(b"\n")

    def finish(self, within_s: float = 60.0) -> Asked:
        wait(lambda: self._node.process.poll() is not None, within_s, self._node)
        assert self._node.process.returncode == 0, self._node.said()
        *made, end = map(json.loads, self._node.out.read_bytes().splitlines())
        return Asked([each["token"] for each in made], [each["at"] for each in made], end)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pulled", "half-open"])
def test_a_cable_that_is_pulled_in_mid_answer(
    how: str, lan: Lan, tmp_path: Path, shared_models: Path
) -> None:
    """Pulled, or with everything on it lost and neither end any the wiser: nothing tells TCP. The
    answer goes on over who is left, with the very same tokens."""
    machines = lan.machines(4)
    nodes = [lan.start(machine, name) for machine, name in zip(machines[:3], "abc", strict=True)]
    all_find_all(*nodes)
    model = shared_models / STORIES
    undisturbed = Asking(lan, machines[3], tmp_path, model).finish()
    assert len(undisturbed.tokens) == TOKENS
    assert undisturbed.end["recoveries"] == []

    asking = Asking(lan, machines[3], tmp_path, model)
    wait(lambda: asking.tokens() >= AFTER_TOKENS, START_WITHIN_S, *nodes)
    cut = time.monotonic()
    (lan.pull if how == "pulled" else lan.hole)(machines[1])
    made = asking.finish()
    assert made.tokens == undisturbed.tokens
    recovery = made.end["recoveries"][0]
    began, waited = made.longest_wait
    parts = {name: value for name, value in recovery.items() if name.endswith("_s")}
    print(f"{how}: cut to next token {began + waited - cut:.2f} s, {parts}")
    assert recovery["device"] == "b"
    assert recovery["detect_s"] <= NOTICED_WITHIN_S + LOADED_S
    work_s = recovery["replan_s"] + recovery["load_s"] + (recovery["replay_s"] or 0.0)
    assert began + waited - cut <= NOTICED_WITHIN_S + work_s + 2 * LOADED_S
    assert "b" not in [stage["device"] for stage in made.end["plan"]["stages"]]

    # b has noticed by itself; it holds nothing of that answer when it is back, and is found.
    found = nodes[0].said().count("Found device b")
    lan.plug(machines[1])
    wait(lambda: nodes[0].said().count("Found device b") > found, 20.0, *nodes)
    held = lan.run(machines[3], "ps", "--home", str(tmp_path / "x"), "--no-discovery",
                   "--peer", f"10.77.0.2:{PORT}")  # fmt: skip
    assert held["stages"] == []


def found_by(lan: Lan, machine: Machine, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What ``edgellm devices`` tells on a machine, by name."""
    told = lan.run(machine, "devices", "--home", str(folder / name), "--wait", "1")
    return {device["name"]: device for device in told["devices"]}


@pytest.mark.slow
def test_multicast_that_is_lost_later_costs_no_device(lan: Lan, tmp_path: Path) -> None:
    """Who is connected stays, and who starts again is reached where it was last."""
    machines = lan.machines(3)
    nodes = [lan.start(machine, name) for machine, name in zip(machines, "abc", strict=True)]
    all_find_all(*nodes)
    lan.lose_multicast(*machines)
    time.sleep(6.0)  # longer than a silent device would stay alive
    assert not any("Lost device" in node.said() for node in nodes)
    told = found_by(lan, machines[0], tmp_path, "a")
    assert {told[name]["state"] for name in "abc"} == {"alive"}

    lan.stop(nodes[2], how=signal.SIGKILL)
    wait(lambda: "Lost device c" in nodes[0].said(), 3.0, *nodes)
    again = lan.start(machines[2], "c")
    wait(again.ready, START_WITHIN_S, again)

    def reached() -> bool:
        return again.found(*nodes[:2]) and all(
            node.said().count("Found device c") == 2 for node in nodes[:2]
        )

    wait(reached, FIND_WITHIN_S + LOADED_S, *nodes[:2], again)
    assert not any("Lost device a" in n.said() or "Lost device b" in n.said() for n in nodes[:2])


def test_a_device_told_of_by_address_is_reached_without_multicast(lan: Lan) -> None:
    """And so are, by what it tells, those that nobody named."""
    machines = lan.machines(3)
    lan.lose_multicast(*machines)
    a, b = lan.start(machines[0], "a"), lan.start(machines[1], "b", "--peer", f"10.77.0.1:{PORT}")
    all_find_all(a, b)
    late = lan.start(machines[2], "c", "--peer", f"10.77.0.2:{PORT}")
    wait(late.ready, START_WITHIN_S, late)
    wait(lambda: late.found(a, b) and a.found(late), FIND_WITHIN_S + LOADED_S, a, b, late)


def test_devices_of_another_cluster_are_told_of_and_not_connected(lan: Lan, tmp_path: Path) -> None:
    pair_homes(tmp_path / "y", tmp_path / "z")
    nodes: list[Node] = [
        lan.start(machine, name) for machine, name in zip(lan.machines(3), "ayb", strict=True)
    ]
    a, y, b = nodes
    wait(lambda: a.found(b) and b.found(a) and y.ready(), START_WITHIN_S + FIND_WITHIN_S, *nodes)
    machine = lan.machine("10.77.0.9/24")
    told = lan.run(machine, "devices", "--home", str(tmp_path / "x"), "--listen", "0.0.0.0",
                   "--wait", "3")  # fmt: skip
    assert {device["name"] for device in told["devices"]} >= {"a", "b"}
    assert "y" not in {device["name"] for device in told["devices"]}
    assert [device["name"] for device in told["unpaired"]] == ["y"]
    refused = (a.said() + b.said() + y.said()).count("not paired")
    assert refused == 0, "nobody dialed who is not of its cluster"
