"""Finding devices by multicast DNS: ``_edgellm._tcp.local.``, over zeroconf.

Loopback always takes part, for the nodes of one machine; other interfaces where the node listens.
An interface that cannot multicast is left out, and when interfaces come or go everything is set
up anew. Who is announced falsely here costs others a few connections, and gets nothing: the
device at an address says itself who it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import secrets
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zeroconf import Error as ZeroconfError
from zeroconf import NotRunningException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from edgellm.discovery.addresses import (
    Interface,
    multicast_places,
    own_addresses,
    split_scope,
)
from edgellm.discovery.base import (
    MAX_ADDRESSES,
    MAX_DEVICES,
    Announcement,
    How,
    OnSighting,
    Sighting,
    sighting_from,
)
from edgellm.discovery.interfaces import machine_interfaces
from edgellm.wire.messages import PROTOCOL

SERVICE = "_edgellm._tcp.local."
WATCH_INTERVAL_S = 2.0
"""How often we look whether interfaces came or went."""
_MAX_PLACES = 32
_RESOLVE_MS = 3000
_RESOLVE_TRIES = 3
_MAX_RESOLVING = 16
"""Names that are resolved at once; more wait."""
_MAX_NAME_BYTES = 200
"""An entry of a TXT record has 255 bytes, with its key."""
_GROUP_4 = socket.inet_aton("224.0.0.251")
_GROUP_6 = ipaddress.IPv6Address("ff02::fb").packed


class MdnsDiscovery:
    """A ``Discovery``. Announces ``me`` if there is one."""

    def __init__(
        self,
        listen: str,
        me: Announcement | None = None,
        *,
        interfaces: Callable[[], Sequence[Interface]] = machine_interfaces,
        on_problem: Callable[[str], None] = lambda problem: None,
    ) -> None:
        """``on_problem`` is told once, in words for people, when there is no multicast here."""
        self._listen = listen
        self._me = me
        self._interfaces = interfaces
        self._on_problem = on_problem
        self._on_sighting: OnSighting = lambda sighting: None
        self._zeroconf: AsyncZeroconf | None = None
        self._names: dict[str, asyncio.Task[None] | None] = {}
        self._stale: set[str] = set()
        """Names that said something new while they were being resolved."""
        self._resolving = asyncio.Semaphore(_MAX_RESOLVING)
        self._watch: asyncio.Task[None] | None = None
        self._change = _new_change()
        self._updates: set[asyncio.Task[None]] = set()
        self._hosts: Sequence[str] = ()
        self._complained = False

    async def start(self, on_sighting: OnSighting) -> None:
        self._on_sighting = on_sighting
        self._watch = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._on_sighting = lambda sighting: None
        if self._watch is not None:
            self._watch.cancel()
            for update in self._updates:
                update.cancel()
            await asyncio.gather(self._watch, *self._updates, return_exceptions=True)
            self._watch = None

    def invite(self, is_open: bool) -> None:
        """Announce from now on whether a new device is let in here."""
        if self._me is None or self._me.invites == is_open:
            return
        self._me = dataclasses.replace(self._me, invites=is_open)
        self._change = _new_change()
        if self._zeroconf is not None:
            task = asyncio.create_task(self._announce_anew(self._zeroconf, self._me))
            self._updates.add(task)
            task.add_done_callback(self._updates.discard)

    async def _announce_anew(self, zeroconf: AsyncZeroconf, me: Announcement) -> None:
        with contextlib.suppress(OSError, ZeroconfError, NotRunningException, KeyError):
            sent = await zeroconf.async_update_service(service_of(me, self._hosts, self._change))
            asyncio.ensure_future(sent).add_done_callback(_seen)

    async def _run(self) -> None:
        try:
            while True:
                there = self._look()
                await self._open(*there)
                await self._until_changed(there)
                await self._shut()
        finally:
            await self._shut()

    def _look(self) -> tuple[tuple[str | int, ...], tuple[str, ...]]:
        """Where multicast works at the moment, and at which addresses we can be reached."""
        interfaces = self._interfaces()
        places = multicast_places(self._listen, interfaces)
        working = tuple(place for place in places if can_multicast(place, interfaces))
        own = own_addresses(self._listen, self._me.port, interfaces) if self._me else ()
        return working[:_MAX_PLACES], tuple(host for host, _ in own[:MAX_ADDRESSES])

    async def _until_changed(self, there: object) -> None:
        while self._look() == there:  # noqa: ASYNC110 - no system tells of it in the same way
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _open(self, places: Sequence[str | int], hosts: Sequence[str]) -> None:
        if not places:
            self._complain("no network interface can do it")
            return
        try:
            self._zeroconf = AsyncZeroconf(interfaces=list(places))
            await self._zeroconf.zeroconf.async_wait_for_start()
            AsyncServiceBrowser(
                self._zeroconf.zeroconf, SERVICE, handlers=[self._on_change]
            )  # ends with its zeroconf
            self._hosts = hosts
            if self._me is not None:
                # Nobody else has our id, so there is nothing to probe for: that would take 1.2 s.
                sent = await self._zeroconf.async_register_service(
                    service_of(self._me, hosts, self._change), cooperating_responders=True
                )
                asyncio.ensure_future(sent).add_done_callback(_seen)
        except (OSError, RuntimeError, ZeroconfError, NotRunningException, TimeoutError) as error:
            self._complain(str(error) or type(error).__name__)
            await self._shut()

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            self._on_problem(
                f"Devices cannot find each other by multicast here ({why})."
                " Name one with --peer HOST:PORT."
            )

    async def _shut(self) -> None:
        for task in self._names.values():
            if task is not None:
                task.cancel()
        self._names.clear()
        self._stale.clear()
        opened, self._zeroconf = self._zeroconf, None
        if opened is not None:
            with contextlib.suppress(OSError, ZeroconfError, NotRunningException, TimeoutError):
                await opened.async_close()

    def _on_change(
        self,
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        """From zeroconf, in the event loop: a name came, went or says something new."""
        if state_change is ServiceStateChange.Removed or self._zeroconf is None:
            if self._names.get(name, False) is None:
                del self._names[name]  # a hint that it may be gone: nobody is evicted for it
            return
        if self._names.get(name) is not None:
            self._stale.add(name)  # what is being resolved may be what it was before
        elif name in self._names or len(self._names) < MAX_DEVICES:
            self._names[name] = asyncio.create_task(self._resolve(zeroconf, name))

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        found = None
        try:
            async with self._resolving:
                for _ in range(_RESOLVE_TRIES):
                    info = AsyncServiceInfo(SERVICE, name)
                    if await info.async_request(zeroconf, _RESOLVE_MS):
                        hosts = info.parsed_scoped_addresses()
                        found = sighting_of(info.properties, hosts, info.port)
                        break
        except (OSError, ZeroconfError, NotRunningException, ValueError):
            pass  # a name that cannot be resolved is nobody
        if name in self._names:
            again = name in self._stale
            self._stale.discard(name)
            self._names[name] = (
                asyncio.create_task(self._resolve(zeroconf, name)) if again else None
            )
        if found is not None and (self._me is None or found.device_id != self._me.device_id):
            self._on_sighting(found)


def _new_change() -> str:
    return secrets.token_hex(4)


def _seen(sent: asyncio.Future[Any]) -> None:
    """An announcement that failed is repeated with the next change; nobody waits for it."""
    if not sent.cancelled():
        sent.exception()


# --- records --------------------------------------------------------------------------


def service_of(me: Announcement, hosts: Sequence[str], change: str = "") -> AsyncServiceInfo:
    """What we announce. Its names come from the device id, so that no two devices collide.

    ``change`` differs with every change: a record that goes back to what it was is no news to
    those who still have the former one.
    """
    label = f"edgellm-{me.device_id[:16]}"
    ips = {parts[0] for host in hosts if (parts := split_scope(host)) is not None}
    name = me.name.encode()[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
    return AsyncServiceInfo(
        SERVICE,
        f"{label}.{SERVICE}",
        addresses=[ip.packed for ip in sorted(ips, key=lambda ip: (ip.version, ip.packed))],
        port=me.port,
        properties={
            "id": me.device_id,
            "name": name,
            "v": str(PROTOCOL),
            "invite": str(int(me.invites)),
            "change": change,
        },
        server=f"{label}.local.",
    )


def sighting_of(
    properties: Mapping[bytes, bytes | None], hosts: Sequence[str], port: int | None
) -> Sighting | None:
    """The device in somebody's records; None where they are not of our kind."""
    told = {key: properties.get(key) for key in (b"id", b"name")}
    id_, name = (value.decode("utf-8", "replace") if value else "" for value in told.values())
    addresses = [(host, port) for host in hosts[: 4 * MAX_ADDRESSES]]
    invites = properties.get(b"invite") == b"1"
    return sighting_from(id_, name, addresses, How.MDNS, invites=invites)


# --- interfaces -----------------------------------------------------------------------


def can_multicast(place: str | int, interfaces: Sequence[Interface]) -> bool:
    """Whether the mDNS group can be joined there: at an IPv4 address, or at the interface with
    that number for IPv6. One that cannot would keep zeroconf from all others."""
    try:
        if isinstance(place, str):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                at = socket.inet_aton(place)
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _GROUP_4 + at)
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, at)
            return True
        joined = _GROUP_6 + struct.pack("@I", place)
        ips = [a.ip for i in interfaces if i.index == place for a in i.addresses]
        for ip in (each for each in ips if each.version == 6):
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
                # An address cannot be used in its first second, while the system looks for others
                # that have it.
                probe.bind((str(ip), 0, 0, place if ip.is_link_local else 0))
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, joined)
    except OSError:
        return False
    return True
