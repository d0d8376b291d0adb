"""Several real node processes on this machine, for ``demo``, the bench and the tests.

Each is ``edgellm join`` with a home of its own below one temporary folder. They end with us,
even when we are killed: a node started here leaves when its standard input closes. Whoever may
write their homes needs no code to pair them: ``pair_homes`` makes them one cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import string
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import DeviceError, UsageError
from edgellm.identity import TrustStore
from edgellm.loaded import COORDINATOR_NAME
from edgellm.settings import LOOPBACK, NodeSettings, figures_folder

START_WITHIN_S = 30.0
STOP_WITHIN_S = 5.0
MAX_DEVICES = 16
_ROOT = str(Path(__file__).resolve().parents[1])
"""A checkout that is not installed works from any folder."""


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """How one local node is to be started."""

    name: str
    memory_bytes: int
    threads: int = 1
    pin: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    """``HOST:PORT`` of nodes to connect to."""
    discovery: bool = False
    """Whether it finds others, and they find it: a demo should meet nobody."""
    probe: bool = False
    """Whether it measures its speed, unless that is known."""
    home: Path | None = None
    """None: a folder that does not outlive it."""
    secure: bool = True
    """False for all devices of a cluster measures what encryption costs."""
    listen: str = LOOPBACK
    """An address of this machine, or of the network that ``behind`` puts it into."""
    behind: tuple[str, ...] = ()
    """A command that becomes the one behind it, such as ``bench.place``."""


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A node that runs."""

    device: LocalDevice
    address: str
    """``HOST:PORT``."""
    process: asyncio.subprocess.Process


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """Nodes that run, and a device that is paired with them: whoever asks them something is it."""

    nodes: list[LocalNode]
    home: Path
    """Of that device."""
    own: NodeSettings | None
    """For a node of it in this process, where one was asked for."""
    _start: Callable[[LocalDevice], Awaitable[LocalNode]]

    @property
    def addresses(self) -> list[str]:
        return [node.address for node in self.nodes]

    def node(self, name: str) -> LocalNode:
        """The one with this device's name; the latest, where it was started again."""
        return next(node for node in self.nodes if node.device.name == name)

    async def start_again(self, name: str) -> None:
        """Start the node of a device whose process has ended, with the home that it had: it must
        have one of its own."""
        ended = self.node(name)
        self.nodes[self.nodes.index(ended)] = await self._start(ended.device)


def our_processors() -> tuple[int, ...]:
    """The processors that this process may use, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def local_devices(
    count: int,
    *,
    memory_bytes: int,
    processors: Sequence[int],
    threads: int = 0,
    pin: bool = True,
) -> list[LocalDevice]:
    """Names a, b, c, ... that share this machine fairly: memory, and processors where they suffice.

    ``memory_bytes`` is for all of them together. Pinning needs a system that can.
    """
    if not 1 <= count <= MAX_DEVICES:
        raise UsageError(f"{count} devices are not between 1 and {MAX_DEVICES}.")
    each = threads or max(1, len(processors) // count)
    pinned = pin and each * count <= len(processors) and hasattr(os, "sched_setaffinity")
    return [
        LocalDevice(
            name=string.ascii_lowercase[index],
            memory_bytes=memory_bytes // count,
            threads=each,
            pin=tuple(processors[index * each : (index + 1) * each]) if pinned else (),
        )
        for index in range(count)
    ]


@contextlib.contextmanager
def aside(devices: Sequence[LocalDevice]) -> Iterator[None]:
    """Keep this process, and what it starts, off the processors that stages have for themselves,
    where others are left: the stages wait actively, so theirs look busy even when they are not.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    spare = allowed - {number for device in devices for number in device.pin}
    try:
        os.sched_setaffinity(0, spare or allowed)
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def pair_homes(names: Mapping[Path, str]) -> None:
    """Make the devices of these home folders one cluster, without codes: for who may write them
    all. ``names`` are what they are called.

    Homes that are paired already stay so. Raises PairingError where two of them belong to different
    clusters, DeviceError for a home that cannot be used.
    """
    stores = {TrustStore(home): name for home, name in names.items()}
    first = next((store for store in stores if store.cluster_id), next(iter(stores)))
    first.found(stores[first])
    for store, name in stores.items():
        if store is not first and not first.members.trusted(store.identity.device_id):
            first.add(store.identity.device_id, name, store.identity.certificate)
    for store in stores:
        if store is not first:
            store.adopt(first.cluster_id, first.members)


def command_environment() -> dict[str, str]:
    """For a command of ours that we start: twins of options are meant for the one that was typed,
    not for those that it starts."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("EDGELLM_")}
    path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH", ""))))
    return {**inherited, "PYTHONPATH": path}


@contextlib.asynccontextmanager
async def local_cluster(
    devices: Sequence[LocalDevice], own: LocalDevice | None = None
) -> AsyncIterator[LocalCluster]:
    """Start the nodes, yield them, end them; no process and no file stays behind. ``own`` is a
    device whose node this process may run itself; it is one of the cluster too."""
    with tempfile.TemporaryDirectory(prefix="edgellm-") as folder:
        homes = [device.home or Path(folder) / device.name for device in devices]
        ours = (own and own.home) or Path(folder) / COORDINATOR_NAME
        secure = all(device.secure for device in (*devices, *filter(None, (own,))))
        if secure:
            names = {home: device.name for home, device in zip(homes, devices, strict=True)}
            names[ours] = own.name if own else COORDINATOR_NAME
            await asyncio.to_thread(pair_homes, names)
        started: list[asyncio.subprocess.Process] = []
        known = dict(zip(devices, homes, strict=True))

        async def start(device: LocalDevice) -> LocalNode:
            started.append(await _spawn(device, known[device], secure))
            return (await _addressed([device], started[-1:]))[0]

        try:
            for device, home in known.items():
                started.append(await _spawn(device, home, secure))
            nodes = await _addressed(devices, started)
            settings = _settings_of(own, ours, secure) if own else None
            yield LocalCluster(nodes, ours, settings, start)
        finally:
            await asyncio.shield(_stop_all(started))


def _settings_of(device: LocalDevice, home: Path, secure: bool) -> NodeSettings:
    return NodeSettings(
        name=device.name,
        home=home,
        listen=device.listen,
        memory_bytes=device.memory_bytes,
        threads=device.threads,
        pin=device.pin,
        probe=figures_folder() if device.probe else None,
        secure=secure,
    )


async def _addressed(
    devices: Sequence[LocalDevice], started: Sequence[asyncio.subprocess.Process]
) -> list[LocalNode]:
    try:
        async with asyncio.timeout(START_WITHIN_S):
            addresses = await asyncio.gather(*map(_address, started, devices))
    except TimeoutError as error:
        raise DeviceError("the local nodes did not start in time.") from error
    return list(map(LocalNode, devices, addresses, started))


async def _spawn(device: LocalDevice, home: Path, secure: bool) -> asyncio.subprocess.Process:
    command = [
        *device.behind,
        sys.executable, "-m", "edgellm", "join", "--json", "--until-stdin-closes",
        "--name", device.name, "--home", str(home), "--listen", device.listen, "--port", "0",
        "--memory", str(device.memory_bytes), "--threads", str(device.threads),
    ]  # fmt: skip
    command.append("--discovery" if device.discovery else "--no-discovery")
    command.append("--probe" if device.probe else "--no-probe")
    command.append("--secure" if secure else "--insecure")
    for peer in device.peers:
        command += ["--peer", peer]
    if device.pin:
        command += ["--pin", ",".join(map(str, device.pin))]
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=command_environment(),
        start_new_session=True,  # Ctrl-C reaches us alone; we end them in order
    )


async def _address(process: asyncio.subprocess.Process, device: LocalDevice) -> str:
    line = await process.stdout.readline() if process.stdout else b""
    try:
        return str(json.loads(line)["address"])
    except (ValueError, KeyError) as error:
        raise DeviceError("its node did not start.", device=device.name) from error


async def _stop_all(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    await asyncio.gather(*map(_stop, processes))


async def _stop(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(STOP_WITHIN_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
