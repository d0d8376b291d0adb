"""The node: what ``edgellm join`` runs. The composition root: the one place that picks concrete
classes for a device (transport, engines, discovery, cache, identity).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from edgellm import __version__
from edgellm.discovery.addresses import (
    ANY,
    LOOPBACK_OF,
    Address,
    format_address,
    own_addresses,
    split_scope,
)
from edgellm.discovery.base import Announcement, Discovery
from edgellm.discovery.directory import State
from edgellm.discovery.interfaces import machine_interfaces
from edgellm.discovery.known import KnownDevices
from edgellm.discovery.mdns import MdnsDiscovery
from edgellm.discovery.static import StaticDiscovery
from edgellm.engine.host import HostFactory, ProcessStage, StageHost
from edgellm.errors import DeviceError, PeerLostError, UsageError
from edgellm.probe import DeviceFigures, device_figures
from edgellm.runtime.exchange import TensorExchange
from edgellm.runtime.hosted import StageParts
from edgellm.runtime.neighbours import Event, Neighbours
from edgellm.runtime.reach import reach
from edgellm.runtime.services import Services
from edgellm.runtime.session import Introduction, Session
from edgellm.runtime.worker import Worker
from edgellm.settings import LOOPBACK, NodeSettings
from edgellm.store.cache import ShardCache
from edgellm.store.home import HomeLock
from edgellm.transport.base import Listener, Stream, Transport
from edgellm.transport.memory import MemoryNetwork
from edgellm.transport.tcp import TcpTransport
from edgellm.wire.messages import DeviceInfo, PeerAddress

__all__ = ["SOFTWARE", "Node", "format_address", "load_device_id", "process_stage"]

SOFTWARE = f"edgellm {__version__}"
MEASURING = "measuring"
"""Among a device's figures while it is finding them out."""
_ID_HEX_DIGITS = 64
DIAL_WITHIN_S = 5.0
_SAME_PORT_TRIES = 8
_DISK_SHARE = 2
"""Without a limit of its own a cache takes one half of what is free and its own."""


async def process_stage(name: str) -> StageHost:
    """The usual host of a stage: a process of its own."""
    return await ProcessStage.start(name)


class Node:
    """One device: listens for peers, finds them, and hosts stages until closed."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        transport: Transport | None = None,
        start_host: HostFactory = process_stage,
        on_event: Callable[[Event], None] = lambda event: None,
        on_notice: Callable[[str], None] = lambda notice: None,
    ) -> None:
        """``on_event`` hears of devices found and lost, ``on_notice`` what people should know."""
        self.settings = settings
        self._transport = transport or TcpTransport()
        self._start_host = start_host
        self._on_event = on_event
        self._on_notice = on_notice
        self._me = Introduction(settings.name, load_device_id(settings.home), SOFTWARE)
        self._sessions: set[Session] = set()
        self._worker: Worker | None = None
        self._neighbours: Neighbours | None = None
        self._listeners: list[Listener] = []
        self._address: Address | None = None
        self._probe: asyncio.Task[None] | None = None
        self._figures: dict[str, int | float] = {}
        self._lock = HomeLock(settings.home)
        self._inside = MemoryNetwork()

    @property
    def device_id(self) -> str:
        return self._me.device_id

    @property
    def address(self) -> Address:
        """(host, port) that peers can most likely connect to; after ``start``, and the same until
        ``close``."""
        if self._address is None:
            raise DeviceError("the node is not started.", device=self.settings.name)
        return self._address

    def addresses(self) -> tuple[Address, ...]:
        """Everywhere that peers may reach this node at the moment, the likeliest first."""
        _, port = self.address
        return own_addresses(self.settings.listen, port, machine_interfaces())

    @property
    def neighbours(self) -> Neighbours:
        """The devices around; after ``start``."""
        if self._neighbours is None:
            raise DeviceError("the node is not started.", device=self.settings.name)
        return self._neighbours

    async def start(self) -> None:
        """Listen, and begin to look for others. Raises PeerLostError when the address cannot be
        used, UsageError when it is not this machine's, HomeBusyError when another node has our
        home."""
        self._lock.acquire()
        try:
            self._worker = self._make_worker()
            port = await self._listen()
            self._address = own_addresses(self.settings.listen, port, machine_interfaces())[0]
            self._lock.tell(format_address(*self._near_address(port)))
            inside = self._inside.transport("node")
            self._listeners.append(await inside.listen(*self._address, self._accept))
            await self.neighbours.start(self._ways(port))
        except BaseException:
            await self.close()
            raise
        if self.settings.probe is not None:
            self._figures = {MEASURING: 1}
            self._probe = asyncio.create_task(self._measure(self.settings.probe))

    def _make_worker(self) -> Worker:
        settings = self.settings
        limit = settings.cache_bytes or _disk_for(settings.home)
        cache = ShardCache(settings.home / "cache", limit)
        cache.sweep()
        exchange = TensorExchange(cache)
        self._neighbours = Neighbours(
            self._me.device_id,
            self._me.name,
            self._dial,
            own=self.addresses,
            remember=KnownDevices(settings.home),
            this_machine_only=not settings.exposed,
            on_event=self._on_event,
        )
        parts = StageParts(
            device=settings.name,
            device_id=self._me.device_id,
            start_host=self._start_host,
            cache=cache,
            exchange=exchange,
            dial=self._dial_device,
            threads=settings.threads,
            pin=settings.pin,
            plain_weights=lambda: DeviceFigures.from_plain(self._figures).plain_weights,
        )
        services = Services(exchange, self._dial_device, self._neighbours)
        return Worker(parts, self.describe, self._allow_payloads, services)

    def _ways(self, port: int) -> Sequence[Discovery]:
        settings = self.settings
        told = StaticDiscovery(settings.peers)
        if not settings.discovery:
            return (told,)
        me = Announcement(self._me.device_id, self._me.name, port)
        mdns = MdnsDiscovery(settings.listen, me, on_problem=self._on_notice)
        return (told, KnownDevices(settings.home), mdns)

    async def _listen(self) -> int:
        """The port that we now listen on, the same at each address."""
        wanted, hosts = self.settings.listen, _hosts(self.settings.listen)
        for last in range(_SAME_PORT_TRIES - 1, -1, -1):
            port = self.settings.port
            try:
                for host in hosts:
                    listener = await self._transport.listen(host, port, self._accept)
                    self._listeners.append(listener)
                    port = listener.address[1]
            except PeerLostError:
                if not _is_ours(wanted):
                    raise UsageError(
                        f"this machine has no address {wanted} to listen on.",
                        hint=f"Use one of its own, {LOOPBACK}, or 0.0.0.0 for all networks.",
                    ) from None
                # The port that was free for one of two addresses need not be for the other.
                if not self._listeners or self.settings.port or not last:
                    raise
                while self._listeners:
                    await self._listeners.pop().close()
            else:
                return port
        raise AssertionError("the last try returns or raises")

    def _near_address(self, port: int) -> Address:
        """Where others on this machine are to connect: over loopback if that is possible, so that
        both sides know that they share a disk."""
        versions = ANY.get(self.settings.listen)
        return self.address if versions is None else (LOOPBACK_OF[versions[0]], port)

    def direct(self) -> Transport:
        """A way to this node from inside its own process, without the kernel between."""
        return self._inside.transport("inside")

    async def close(self) -> None:
        """Stop listening, end all stages, hang up."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        if self._neighbours is not None:
            await self._neighbours.close()
        while self._listeners:
            await self._listeners.pop().close()
        if self._worker is not None:
            await self._worker.close()
        for session in list(self._sessions):
            await session.close()
        self._lock.release()

    async def _measure(self, folder: Path) -> None:
        """Find out what this device can do: known from before, or measured now, for seconds."""
        threads = self.settings.threads or os.cpu_count() or 1
        found = await device_figures(folder, threads=threads, pin=self.settings.pin)
        self._figures = {}
        if found.figures is None:
            self._on_notice(f"This device's speed is not known: {found.reason}")
        else:
            self._figures = dict(found.figures.to_plain())

    def describe(self) -> DeviceInfo:
        """What this device offers now."""
        free = psutil.virtual_memory().available
        within = _cgroup_free()
        if within is not None:
            free = min(free, within)
        offered = self.settings.memory_bytes or free
        engines = ["stub"]
        if importlib.util.find_spec("llama_cpp") is not None:
            engines.append("llama")
        return DeviceInfo(
            name=self.settings.name,
            device_id=self._me.device_id,
            memory_total=offered,
            memory_free=min(offered, free),
            cores=self.settings.threads or os.cpu_count() or 1,
            software=SOFTWARE,
            engines=tuple(engines),
            figures=self._figures,
        )

    async def _accept(self, stream: Stream) -> None:
        if self._worker is not None:
            await Session.accept(stream, self._me, self._worker, on_open=self._register)

    async def _dial(self, host: str, port: int) -> Session:
        if self._worker is None:
            raise DeviceError("the node is not started.", device=self.settings.name)
        session = await Session.dial(
            self._transport, host, port, self._me, self._worker, within_s=DIAL_WITHIN_S
        )
        self._register(session)
        return session

    async def _dial_device(self, peer: PeerAddress) -> Session:
        """A new connection to a device: where we reach it ourselves, or where we are told."""
        known = [p for p in self.neighbours.peers() if p.device_id == peer.device_id]
        addresses = [(p.host, p.port) for p in known if p.state is State.REACHED]
        told = dict.fromkeys([*addresses, (peer.host, peer.port)])
        return (await reach(self._dial, list(told), peer.device_id)).session

    def _register(self, session: Session) -> None:
        self._sessions.add(session)
        session.on_close(lambda reason: self._sessions.discard(session))
        if self._worker is not None:
            session.allow_payloads(self._worker.payload_limits_of(session))

    def _allow_payloads(self, allow: Callable[[Session], Mapping[int, int]]) -> None:
        for session in self._sessions:
            session.allow_payloads(allow(session))


def _hosts(listen: str) -> tuple[str, ...]:
    """What to bind. ``::`` alone is IPv6 only, as asyncio binds it."""
    if listen == "localhost":
        return (LOOPBACK,)
    if ANY.get(listen) != (4, 6):
        return (listen,)
    six = any(a.version == 6 for i in machine_interfaces() for a in i.addresses)
    four = next(host for host, versions in ANY.items() if versions == (4,))
    return (listen, four) if six else (four,)


def _is_ours(listen: str) -> bool:
    parts = split_scope(listen)
    if listen in ANY or parts is None:
        return True
    ours = {each.ip for interface in machine_interfaces() for each in interface.addresses}
    return parts[0] in ours or parts[0].is_loopback


def _disk_for(home: Path) -> int:
    """Bytes that the cache of a node may take, where nobody said how many."""
    own = sum(path.stat().st_size for path in (home / "cache").rglob("*") if path.is_file())
    return (shutil.disk_usage(home).free + own) // _DISK_SHARE


def load_device_id(home: Path) -> str:
    """This device's id, made on first use: 64 hex digits. Raises DeviceError for a bad home."""
    path = home / "device_id"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists():
            text = path.read_text(encoding="ascii").strip()
            if len(text) == _ID_HEX_DIGITS and set(text) <= set("0123456789abcdef"):
                return text
        made = secrets.token_hex(_ID_HEX_DIGITS // 2)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(made + "\n", encoding="ascii")
        aside.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"the home folder {home} cannot be used: {error}.",
            hint="Name another one with --home or EDGELLM_HOME.",
        ) from error
    return made


def _cgroup_free() -> int | None:
    """Bytes that the control group (a container) still allows, None where it sets no limit."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "memory.max").read_text(encoding="ascii"))
        return max(0, most - int((folder / "memory.current").read_text(encoding="ascii")))
    return None
