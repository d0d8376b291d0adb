"""``edgellm join`` on loopback: what people read when devices come and go, and what cannot be."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgellm.discovery.base import How, Sighting
from edgellm.discovery.find import find_devices
from edgellm.localcluster import local_cluster, local_devices
from edgellm.node import Node
from edgellm.settings import NodeSettings
from tests.cluster.processes import edgellm, environment, told, wait_for


@dataclass
class Joined:
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def address(self) -> str:
        return str(json.loads(self.out.read_text(encoding="utf-8"))["address"])

    def said(self) -> str:
        return self.err.read_text(encoding="utf-8")


@contextlib.contextmanager
def joined(folder: Path, name: str, *options: str) -> Iterator[Joined]:
    """A node in a process of its own, until the end of the block."""
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    command = [sys.executable, "-m", "edgellm", "join", "--json", "--name", name,
               "--home", str(folder / name), *options]  # fmt: skip
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
            env=environment(folder), cwd=folder,
        )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or out.read_bytes().endswith(b"\n"))
        yield Joined(process, out, err)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            process.kill()


@pytest.mark.parametrize("way", ["mdns", "peer"])
def test_two_devices_of_one_machine_find_and_lose_each_other(way: str, tmp_path: Path) -> None:
    options = ("--discovery",) if way == "mdns" else ("--no-discovery",)
    with joined(tmp_path, "kitchen", *options) as kitchen:
        told_peer = ("--peer", kitchen.address) if way == "peer" else ()
        with joined(tmp_path, "attic", *options, *told_peer) as attic:
            wait_for(lambda: "Found device attic at 127.0.0.1:" in kitchen.said(), 5.0)
            wait_for(lambda: f"Found device kitchen at {kitchen.address}." in attic.said(), 5.0)
            assert attic.said().index("is ready at") < attic.said().index("Found device")
        wait_for(lambda: "Lost device attic at 127.0.0.1:" in kitchen.said(), 5.0)
        assert "this machine only" in kitchen.said()
        assert "Traceback" not in kitchen.said() + attic.said()
        assert len(kitchen.out.read_text(encoding="utf-8").splitlines()) == 1
        assert "Lost device kitchen" not in attic.said()  # it was the one that left
    assert "Found" not in kitchen.out.read_text(encoding="utf-8")


def test_a_peer_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    with joined(tmp_path, "kitchen", "--peer", "127.0.0.1:9") as kitchen:
        wait_for(lambda: "No device at 127.0.0.1:9 yet: cannot connect" in kitchen.said(), 5.0)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--listen", "203.0.113.1"), 2, "no address 203.0.113.1"),
        (("--listen", "kitchen"), 2, "no address to listen on"),
        (("--listen", "224.0.0.1"), 2, "no address to listen on"),
        (("--peer", "kitchen"), 2, "is not an address"),
        (("--peer", "fd00::1:80"), 2, "IPv6"),
        (("--cache-size", "much"), 2, "is not a size"),
    ],
)
def test_a_join_that_cannot_be(
    options: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    told(edgellm("join", *options, "--json", temp=tmp_path), code, words)


def test_who_listens_on_all_networks_is_warned(tmp_path: Path) -> None:
    with joined(tmp_path, "kitchen", "--listen", "0.0.0.0") as kitchen:
        assert "0.0.0.0" not in kitchen.address
        wait_for(lambda: "anyone on this network" in kitchen.said())
        lock = (tmp_path / "kitchen" / "node.lock").read_text(encoding="ascii")
        assert lock == "127.0.0.1:" + kitchen.address.rpartition(":")[2]


async def test_local_nodes_meet_only_if_asked_to(tmp_path: Path) -> None:
    devices = local_devices(2, memory_bytes=1 << 30, processors=(0, 1), pin=False)
    async with local_cluster(devices[:1]) as (first,):
        friend = replace(devices[1], peers=(first.address,))
        async with local_cluster([friend]):
            settings = NodeSettings("c", tmp_path, peers=(("127.0.0.1", _port(first.address)),))
            node = Node(settings)
            await node.start()
            try:
                await node.neighbours.wait_for(lambda peers: len(peers) == 2, 5.0)
                assert {peer.name for peer in node.neighbours.peers()} == {"a", "b"}
            finally:
                await node.close()


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_a_command_finds_nodes_without_being_one(tmp_path: Path) -> None:
    settings = NodeSettings("x", tmp_path / "x", discovery=True)
    with joined(tmp_path, "kitchen", "--discovery") as kitchen:
        found: list[Sighting] = []
        async with contextlib.aclosing(find_devices(settings, 5.0)) as sightings:
            async for sighting in sightings:
                found.append(sighting)
                if sighting.name == "kitchen":
                    break
    assert (found[-1].how, found[-1].addresses[0][1]) == (How.MDNS, _port(kitchen.address))
