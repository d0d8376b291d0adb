"""Machines on a LAN of their own, for tests: network namespaces, joined by a bridge in one more.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import environment

FIND_WITHIN_S = 5.0
START_WITHIN_S = 20.0
PORT = 7171


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run iproute2's ``ip``."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True, timeout=20)


def why_not() -> str:
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

    def pull(self, machine: Machine) -> None:
        """Pull its cable out."""
        ip("-n", self._switch, "link", "set", machine.port, "down")

    def plug(self, machine: Machine) -> None:
        """Plug it in again."""
        ip("-n", self._switch, "link", "set", machine.port, "master", "switch", "up")

    def hole(self, machine: Machine) -> None:
        """Its cable is in, and all that it sends and is sent vanishes. ``plug`` ends it."""
        ip("-n", self._switch, "link", "set", machine.port, "nomaster")

    def inside(self, machine: Machine | None, *command: str) -> list[str]:
        """A command line that runs on a machine, or, without one, where its switch is."""
        namespace = self._switch if machine is None else machine.namespace
        return ["ip", "netns", "exec", namespace, *command]

    def begin(self, machine: Machine | None, name: str, command: Sequence[str]) -> Node:
        """Start a command there; what it says is kept in files, and it ends when the LAN does."""
        run = next(self._runs)
        out, err = self._folder / f"{name}.{run}.out", self._folder / f"{name}.{run}.err"
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                self.inside(machine, *command),
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env=environment(self._folder) | {"EDGELLM_DISCOVERY": "1"},
                cwd=self._folder,
            )
        node = Node(name, process, out, err)
        self._nodes.append(node)
        return node

    def start(self, machine: Machine, name: str, *options: str, listen: str = "0.0.0.0") -> Node:
        """Start a node; its home is kept for the next one of that name."""
        command = [
            sys.executable, "-m", "edgellm", "join",
            "--name", name, "--home", str(self._folder / name), "--listen", listen,
            "--port", str(PORT), "--memory", "1GiB", "--threads", "1", "--no-probe", "--json",
            *options,
        ]  # fmt: skip
        return self.begin(machine, name, command)

    def run(self, machine: Machine, *words: str) -> dict[str, Any]:
        """Run ``edgellm WORDS --json`` on a machine to its end; the object that it prints."""
        done = subprocess.run(
            self.inside(machine, sys.executable, "-m", "edgellm", *words, "--json"),
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

    def chat(self, machine: Machine, name: str, *options: str) -> dict[str, Any]:
        """Run ``edgellm chat`` on a machine with the home ``name``; what it prints."""
        home = str(self._folder / name)
        return self.run(machine, "chat", "--name", name, "--home", home, "--no-probe", *options)

    def stop(self, *nodes: Node, how: signal.Signals = signal.SIGTERM) -> None:
        for node in nodes:
            node.end(how)
        for node in nodes:
            node.wait()

    def close(self) -> None:
        self.stop(*self._nodes, how=signal.SIGKILL)
        for namespace in self._namespaces:
            ip("netns", "del", namespace, check=False)


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
