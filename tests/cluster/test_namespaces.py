"""Devices on a LAN of their own: network namespaces, joined by a bridge in one more.

Nothing of this machine's own network is touched, and nothing stays. Needs root and Linux.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgellm.discovery.addresses import format_address
from tests.cluster.processes import environment

FIND_WITHIN_S = 5.0
START_WITHIN_S = 20.0
PORT = 7171


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run iproute2's ``ip``."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True, timeout=20)


def _why_not() -> str:
    """Why there can be no namespaces here, or nothing."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "no network namespaces here: they need Linux and iproute2"
    name = f"edgellm-try-{secrets.token_hex(4)}"
    made = ip("netns", "add", name, check=False)
    if made.returncode:
        return f"network namespaces are not permitted here: {made.stderr.strip()[:200]}"
    try:
        bridge = ip("-n", name, "link", "add", "switch", "type", "bridge", check=False)
    finally:
        ip("netns", "del", name, check=False)
    return f"no bridges here: {bridge.stderr.strip()[:200]}" if bridge.returncode else ""


@dataclass
class Machine:
    """A namespace with an interface ``eth0`` on the LAN, and the nodes that run in it."""

    namespace: str
    port: str
    """The other end of its cable."""

    def ip(self, *words: str) -> None:
        ip("-n", self.namespace, *words)

    def decoy(self, name: str, address: str) -> None:
        """An interface that leads nowhere."""
        self.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
        self.ip("addr", "add", address, "dev", name)
        self.ip("link", "set", f"{name}-end", "up")
        self.ip("link", "set", name, "up")

    def link_local(self) -> str:
        """The interface's own IPv6 address, as soon as it may be used."""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            shown = ip("-n", self.namespace, "-j", "-6", "addr", "show", "dev", "eth0").stdout
            for info in json.loads(shown)[0]["addr_info"]:
                if info["scope"] == "link" and not info.get("tentative"):
                    return str(info["local"])
            time.sleep(0.05)
        raise TimeoutError("no link-local address")


@dataclass
class Node:
    """``edgellm join`` on a machine."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    began: float = 0.0
    """When it was ready."""

    def ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended: {self.err.read_text(encoding='utf-8')}")
        if not self.began and self.out.read_bytes().endswith(b"\n"):
            self.began = time.monotonic()
        return bool(self.began)

    @property
    def address(self) -> str:
        return str(json.loads(self.out.read_bytes())["address"])

    def found(self, *others: Node) -> bool:
        said = self.err.read_text(encoding="utf-8")
        return all(f"Found device {other.name} at " in said for other in others)

    def said(self) -> str:
        return f"{self.name}:\n{self.err.read_text(encoding='utf-8')}"

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)

    def wait(self) -> None:
        """Wait for its end."""
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Lan:
    """A switch and machines around it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = f"edgellm-{os.getpid()}-{secrets.token_hex(3)}"
        self._switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []
        self._nodes: list[Node] = []
        self._runs = itertools.count()
        self._add(self._switch)
        ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self._switch, "link", "set", "switch", "up")

    def _add(self, namespace: str) -> None:
        ip("netns", "add", namespace)
        self._namespaces.append(namespace)

    def machine(self, *addresses: str, six: bool = False) -> Machine:
        """A machine with these addresses; with ``six`` the system adds a link-local one."""
        number = len(self._namespaces)
        machine = Machine(f"{self._prefix}-{number}", f"port{number}")
        self._add(machine.namespace)
        machine.ip(
            "link", "add", "eth0", "type", "veth", "peer", "name", machine.port,
            "netns", self._switch,
        )  # fmt: skip
        ip("-n", self._switch, "link", "set", machine.port, "master", "switch", "up")
        if not six:
            machine.ip("link", "set", "eth0", "addrgenmode", "none")
        for address in addresses:
            # Looking for others with the same address takes two seconds, and nobody else is here.
            machine.ip("addr", "add", address, "dev", "eth0", *["nodad"] * (":" in address))
        machine.ip("link", "set", "lo", "up")
        machine.ip("link", "set", "eth0", "up")
        return machine

    def machines(self, count: int) -> list[Machine]:
        """Machines 10.77.0.1, 10.77.0.2, ..."""
        return [self.machine(f"10.77.0.{number}/24") for number in range(1, count + 1)]

    def lose_multicast(self, *machines: Machine) -> None:
        """The switch passes multicast on to nobody: what a guest Wi-Fi does."""
        for machine in machines:
            ip("-n", self._switch, "link", "set", machine.port, "type", "bridge_slave",
               "mcast_flood", "off")  # fmt: skip

    def start(self, machine: Machine, name: str, *options: str, listen: str = "0.0.0.0") -> Node:
        """Start a node; its home is kept for the next one of that name."""
        run = next(self._runs)
        out, err = self._folder / f"{name}.{run}.out", self._folder / f"{name}.{run}.err"
        command = [
            "ip", "netns", "exec", machine.namespace, sys.executable, "-m", "edgellm", "join",
            "--name", name, "--home", str(self._folder / name), "--listen", listen,
            "--port", str(PORT), "--memory", "1GiB", "--no-probe", "--json", *options,
        ]  # fmt: skip
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env=environment(self._folder) | {"EDGELLM_DISCOVERY": "1"},
                cwd=self._folder,
            )
        node = Node(name, process, out, err)
        self._nodes.append(node)
        return node

    def chat(self, machine: Machine, name: str, *options: str) -> dict[str, Any]:
        """Run ``edgellm chat`` on a machine with the home ``name``; what it prints."""
        command = [
            "ip", "netns", "exec", machine.namespace, sys.executable, "-m", "edgellm", "chat",
            "--name", name, "--home", str(self._folder / name), "--no-probe", "--json", *options,
        ]  # fmt: skip
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(self._folder) | {"EDGELLM_DISCOVERY": "1"},
            cwd=self._folder,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        assert isinstance(made, dict)
        return made

    def stop(self, *nodes: Node, how: signal.Signals = signal.SIGTERM) -> None:
        for node in nodes:
            node.end(how)
        for node in nodes:
            node.wait()

    def close(self) -> None:
        self.stop(*self._nodes, how=signal.SIGKILL)
        for namespace in self._namespaces:
            ip("netns", "del", namespace, check=False)


@pytest.fixture(scope="module")
def permitted() -> None:
    reason = _why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def lan(permitted: None, tmp_path: Path) -> Iterator[Lan]:
    made = Lan(tmp_path)
    try:
        yield made
    finally:
        made.close()


def wait(condition: Callable[[], object], within_s: float, *nodes: Node) -> None:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s:g} s\n" + "\n".join(n.said() for n in nodes))
        time.sleep(0.02)


def all_find_all(*nodes: Node) -> float:
    """Wait for it; gives the seconds that it took from when the last node was ready."""
    wait(lambda: all(node.ready() for node in nodes), START_WITHIN_S, *nodes)
    last = max(node.began for node in nodes)

    def found() -> bool:
        return all(one.found(*(o for o in nodes if o is not one)) for one in nodes)

    wait(found, FIND_WITHIN_S, *nodes)
    return time.monotonic() - last


def test_three_devices_find_each_other_by_multicast(lan: Lan) -> None:
    machines = lan.machines(3)
    nodes = [lan.start(machine, name) for machine, name in zip(machines, "abc", strict=True)]
    took = all_find_all(*nodes)
    print(f"{took:.2f} s")
    assert [node.address for node in nodes] == [f"10.77.0.{n}:{PORT}" for n in (1, 2, 3)]
    assert all("no pairing" in node.said() for node in nodes)
    lan.stop(nodes[2])
    wait(lambda: "Lost device c at 10.77.0.3:7171" in nodes[0].said(), 3.0, *nodes)


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
