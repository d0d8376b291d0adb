"""Devices on a LAN of their own, which find each other, or not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from edgellm.discovery.addresses import format_address
from tests.cluster.lan import FIND_WITHIN_S, PORT, START_WITHIN_S, Lan, all_find_all, wait
from tests.cluster.processes import pair_homes


def test_three_devices_find_each_other_by_multicast(lan: Lan) -> None:
    machines = lan.machines(3)
    nodes = [lan.start(machine, name) for machine, name in zip(machines, "abc", strict=True)]
    took = all_find_all(*nodes)
    print(f"{took:.2f} s")
    assert [node.address for node in nodes] == [f"10.77.0.{n}:{PORT}" for n in (1, 2, 3)]
    lan.stop(nodes[2])
    wait(lambda: "Lost device c at 10.77.0.3:7171" in nodes[0].said(), 3.0, *nodes)


def test_two_clusters_on_one_network_do_not_mix(lan: Lan, tmp_path: Path) -> None:
    """Also while devices of both look for their own."""
    pair_homes(tmp_path / "y", tmp_path / "z")
    nodes = [
        lan.start(machine, name) for machine, name in zip(lan.machines(4), "aybz", strict=True)
    ]
    a, y, b, z = nodes
    wait(lambda: a.found(b) and b.found(a), START_WITHIN_S + FIND_WITHIN_S, *nodes)
    wait(lambda: y.found(z) and z.found(y), START_WITHIN_S + FIND_WITHIN_S, *nodes)
    time.sleep(1.0)
    assert not any(ours.found(other) for ours in (a, b) for other in (y, z))
    assert not any(ours.found(other) for ours in (y, z) for other in (a, b))


def test_without_multicast_a_told_peer_is_enough_for_all_and_for_the_next_time(lan: Lan) -> None:
    machines = lan.machines(3)
    lan.lose_multicast(*machines)
    peer = ("--peer", f"10.77.0.1:{PORT}")
    hub = lan.start(machines[0], "a")
    nodes = [hub, lan.start(machines[1], "b", *peer), lan.start(machines[2], "c", *peer)]
    all_find_all(*nodes)
    lan.stop(*nodes)
    again = [lan.start(machine, name) for machine, name in zip(machines, "abc", strict=True)]
    all_find_all(*again)


def test_without_discovery_only_the_told_peer_is_found(lan: Lan) -> None:
    machines = lan.machines(3)
    stranger = lan.start(machines[2], "x")
    a = lan.start(machines[0], "a", "--no-discovery")
    b = lan.start(machines[1], "b", "--no-discovery", "--peer", f"10.77.0.1:{PORT}")
    all_find_all(a, b)
    wait(stranger.ready, START_WITHIN_S, stranger)
    time.sleep(1.0)
    assert not stranger.found(a) and not stranger.found(b) and not a.found(stranger)


def test_a_chat_over_three_machines_fetches_what_each_lacks(lan: Lan, shared_models: Path) -> None:
    """``join`` on two machines, ``chat`` on one of them, and on a third where nothing ran yet."""
    machines = lan.machines(3)
    a, b = lan.start(machines[0], "a"), lan.start(machines[1], "b")
    all_find_all(a, b)
    asked = (
        "--model", str(shared_models / "stories260K-f32.gguf"), "--raw", "--exact", "--ctx", "256",
        "--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "30",
    )  # fmt: skip
    first = lan.chat(machines[0], "a", *asked, "--stages", "a:0-3,b:3-5")
    assert [stage["device"] for stage in first["plan"]["stages"]] == ["a", "b"]
    own, fetched = first["load"]
    assert own["fetched_bytes"] == 0  # a has the model's file
    assert fetched["fetched_bytes"] > 200_000  # b has another disk, as far as anybody tells it
    three = lan.chat(
        machines[2], "c", *asked, "--listen", "0.0.0.0", "--stages", "b:0-2,c:2-4,a:4-5"
    )
    assert [stage["device"] for stage in three["plan"]["stages"]] == ["b", "c", "a"]
    assert three["tokens"] == first["tokens"]
    assert three["load"][0]["fetched_bytes"] > 0
    assert three["load"][1]["fetched_bytes"] == 0
    again = lan.chat(machines[0], "a", *asked, "--stages", "a:0-3,b:3-5")
    assert [load["fetched_bytes"] for load in again["load"]] == [0, 0]
    assert again["tokens"] == first["tokens"]


def test_decoy_interfaces_do_not_hinder(lan: Lan) -> None:
    """Each machine has a bridge with the same address, as container engines make them, and one an
    address that a route of the other leads nowhere."""
    a, b = lan.machines(2)
    a.decoy("docker0", "172.17.0.1/16")
    b.decoy("docker0", "172.17.0.1/16")
    b.decoy("lan1", "10.3.0.9/24")
    a.ip("route", "add", "10.3.0.0/24", "via", "10.77.0.99")  # nobody is there
    nodes = [lan.start(a, "a"), lan.start(b, "b")]
    all_find_all(*nodes)
    assert f"Found device b at 10.77.0.2:{PORT}" in nodes[0].said()


def test_ipv6_alone(lan: Lan) -> None:
    machines = [lan.machine(f"fd77::{number}/64") for number in (1, 2)]
    nodes = [lan.start(m, n, listen="::") for m, n in zip(machines, "ab", strict=True)]
    all_find_all(*nodes)
    assert f"Found device b at [fd77::2]:{PORT}" in nodes[0].said()


@pytest.mark.parametrize("by", ["multicast", "peer"])
def test_link_local_addresses_alone(by: str, lan: Lan) -> None:
    machines = [lan.machine(six=True) for _ in range(2)]
    if by == "peer":
        first = format_address(f"{machines[0].link_local()}%eth0", PORT)
        options: dict[str, Any] = {
            "a": ["--no-discovery"],
            "b": ["--no-discovery", "--peer", first],
        }
    else:  # the addresses come to be usable while the nodes start
        options = {"a": [], "b": []}
    nodes = [
        lan.start(machine, name, *options[name], listen="::")
        for machine, name in zip(machines, "ab", strict=True)
    ]
    all_find_all(*nodes)
    assert f"[{machines[1].link_local()}%eth0]:{PORT}" in nodes[0].said()


def test_both_families_reach_a_node_on_all_networks(lan: Lan) -> None:
    a = lan.machine("10.77.0.1/24", "fd77::1/64")
    b, c = lan.machine("10.77.0.2/24"), lan.machine("fd77::3/64")
    hub = lan.start(a, "a", "--no-discovery", listen="::")
    four = lan.start(b, "b", "--no-discovery", "--peer", f"10.77.0.1:{PORT}")
    six = lan.start(c, "c", "--no-discovery", "--peer", f"[fd77::1]:{PORT}", listen="::")
    all_find_all(hub, four)
    all_find_all(hub, six)


def test_a_machine_without_any_network_says_so_once_and_works_on(lan: Lan) -> None:
    machine = lan.machine()
    machine.ip("link", "set", "lo", "down")
    machine.ip("link", "set", "eth0", "down")
    node = lan.start(machine, "a")
    wait(node.ready, START_WITHIN_S, node)
    wait(lambda: "by multicast" in node.said(), 3.0, node)
    time.sleep(2.5)
    assert node.said().count("by multicast") == 1
    machine.ip("link", "set", "lo", "up")
    other = lan.start(machine, "b", "--port", "0", listen="127.0.0.1")
    all_find_all(node, other)
