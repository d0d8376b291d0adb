"""Which addresses a device has, and in which order to try those of another. Pure.

The order is a guess and never more: whoever uses it tries every address. A host is an IP address
in text, IPv6 link-local ones with their scope (``fe80::1%eth0``), because they mean nothing
without.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from edgellm.errors import UsageError

Address: TypeAlias = tuple[str, int]
"""(host, port)."""
IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPInterface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface

ANY = {"0.0.0.0": (4,), "::": (4, 6)}
"""The addresses that stand for all, and the IP versions that listening there is meant for."""
MAX_CANDIDATES = 24
"""With one for each interface that a link-local address may be behind."""
_MAX_HOST = 255
_PORTS = 1 << 16
_PORT_DIGITS = 5
_SHARED = ipaddress.ip_network("100.64.0.0/10")
"""Behind a provider's NAT; on most devices it is a VPN's."""
_VIRTUAL = re.compile(
    r"(docker|br-[0-9a-f]|veth|virbr|vnet|lxc|lxd|cni|flannel|cali|podman|vmnet|vboxnet"
    r"|vEthernet|tun|tap|wg|utun|tailscale|zt|ppp|ipsec|nordlynx|proton|gpd|awdl|llw|anpi)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of this machine that is up."""

    name: str
    index: int
    addresses: tuple[IPInterface, ...]
    """With their networks, and without scopes."""

    @property
    def loopback(self) -> bool:
        return any(each.ip.is_loopback for each in self.addresses)

    @property
    def virtual(self) -> bool:
        """Whether its name is that of a VPN, or of a bridge to containers or virtual machines."""
        return _VIRTUAL.match(self.name) is not None

    @property
    def scope(self) -> str:
        """How an address names it."""
        return self.name if re.fullmatch(r"[\w.-]+", self.name) else str(self.index)


def format_address(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> Address:
    """``HOST:PORT`` or ``[IPV6]:PORT``; the host may be a name. Raises UsageError."""
    host, _, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(
            f"{text[:200]!r} is not an address.", hint="Write IPv6 ones like [fd00::7]:7171."
        )
    numbered = port.isascii() and port.isdecimal() and len(port) <= _PORT_DIGITS
    if not host or not host.isprintable() or not numbered or not 0 < int(port) < _PORTS:
        raise UsageError(
            f"{text[:200]!r} is not an address.", hint="Write it like 192.168.1.7:7171."
        )
    return host, int(port)


def split_scope(host: str) -> tuple[IPAddress, str] | None:
    """The address and its scope (or ""); None for what is no IP address."""
    bare, _, scope = host.partition("%")
    try:
        return ipaddress.ip_address(bare), scope
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    parts = split_scope(host)
    return host == "localhost" if parts is None else parts[0].is_loopback


def is_usable(address: object) -> TypeGuard[Address]:
    """Whether it is the IP address and port of one machine, whatever wrote it."""
    if not isinstance(address, tuple) or len(address) != 2:
        return False
    host, port = address
    if not isinstance(host, str) or len(host) > _MAX_HOST:
        return False
    if type(port) is not int or not 0 < port < _PORTS:
        return False
    parts = split_scope(host)
    if parts is None or (parts[1] and not re.fullmatch(r"[\w.-]{1,64}", parts[1], re.ASCII)):
        return False
    return not (parts[0].is_unspecified or parts[0].is_multicast or _is_broadcast(parts[0]))


def _is_broadcast(ip: IPAddress) -> bool:
    return ip.version == 4 and ip.packed == b"\xff\xff\xff\xff"


# --- our own --------------------------------------------------------------------------


def own_addresses(listen: str, port: int, interfaces: Iterable[Interface]) -> tuple[Address, ...]:
    """Where a node that listens on ``listen`` can be reached, the likeliest to work first.

    Loopback only where there is nothing else.
    """
    versions = ANY.get(listen)
    if versions is None:
        return ((LOOPBACK_OF[4] if listen == "localhost" else listen, port),)
    ranked = sorted(
        (_own_rank(interface, each.ip), place, _hosted(each.ip, interface))
        for place, interface in enumerate(interfaces)
        for each in interface.addresses
        if each.ip.version in versions and not each.ip.is_loopback
    )
    return tuple((host, port) for _, _, host in ranked) or ((LOOPBACK_OF[versions[0]], port),)


LOOPBACK_OF = {4: "127.0.0.1", 6: "::1"}


def _own_rank(interface: Interface, ip: IPAddress) -> int:
    if interface.virtual or (ip.version == 4 and ip in _SHARED):
        return 4
    if ip.is_link_local:
        return 3 if ip.version == 6 else 2
    return 0 if ip.version == 4 else 1


def _hosted(ip: IPAddress, interface: Interface) -> str:
    if ip.version == 6 and ip.is_link_local:
        return f"{ip}%{interface.scope}"
    return str(ip)


# --- another device's -----------------------------------------------------------------


def candidates(
    sighted: Sequence[Address], interfaces: Sequence[Interface], own: Collection[Address] = ()
) -> tuple[Address, ...]:
    """What to dial to reach a device that says it is at ``sighted``, the likeliest first.

    ``own`` are the addresses that we listen at: nobody else is there. Hosts that are names stay as
    they are. A device on this machine is tried over loopback first: that is the shortest way, and
    both sides then know that they share a disk.
    """
    ranked: dict[Address, tuple[int, int]] = {}
    ours = {each.ip for interface in interfaces for each in interface.addresses}
    own_ports = {port for _, port in own}
    for place, (host, port) in enumerate(sighted):
        parts = split_scope(host)
        if parts is None:
            ranked.setdefault((host, port), (1, place))
            continue
        ip, scope = parts
        if ip in ours or ip.is_loopback:
            if port in own_ports and (ip.is_loopback or (host, port) in own or _any_scope(ip, own)):
                continue
            ranked.setdefault((LOOPBACK_OF[ip.version], port), (0, place))
        for each in _scoped(ip, scope, interfaces):
            ranked.setdefault((each, port), (_rank(ip, interfaces), place))
    ordered = sorted(ranked, key=lambda address: ranked[address])
    return tuple(address for address in ordered if address not in own)[:MAX_CANDIDATES]


def on_this_machine(sighted: Iterable[Address], interfaces: Iterable[Interface]) -> bool:
    """Whether a device that says it is at ``sighted`` runs on this machine, if it tells the truth:
    loopback addresses mean this machine, whoever says them."""
    ours = {each.ip for interface in interfaces for each in interface.addresses}
    parts = [split_scope(host) for host, _ in sighted]
    return any(each is not None and (each[0].is_loopback or each[0] in ours) for each in parts)


def _any_scope(ip: IPAddress, own: Collection[Address]) -> bool:
    return any(parts is not None and parts[0] == ip for parts in (split_scope(h) for h, _ in own))


def _scoped(ip: IPAddress, scope: str, interfaces: Sequence[Interface]) -> list[str]:
    """Link-local addresses with a scope that exists here; without one, with each that could be."""
    if ip.version != 6 or not ip.is_link_local:
        return [str(ip)]
    linked = [i for i in interfaces if any(a.ip.version == 6 for a in i.addresses)]
    named = [i for i in linked if scope and scope in (i.name, str(i.index))]
    return [f"{ip}%{i.scope}" for i in named or linked if not i.loopback]


def _rank(ip: IPAddress, interfaces: Iterable[Interface]) -> int:
    """0 loopback, 1 a network that we are in, 2 the same link, 3 elsewhere, 4 and 5 by tunnel."""
    if ip.is_loopback:
        return 0
    shared = [
        interface
        for interface in interfaces
        if any(ip.version == a.ip.version and ip in a.network for a in interface.addresses)
    ]
    if ip.version == 6 and ip.is_link_local:
        return 2
    if any(not interface.virtual for interface in shared):
        return 1
    if shared:
        return 4
    return 5 if ip.version == 4 and ip in _SHARED else 3


# --- where to announce ----------------------------------------------------------------


def multicast_places(listen: str, interfaces: Iterable[Interface]) -> tuple[str | int, ...]:
    """Where to look for devices and to announce ourselves: IPv4 addresses, and numbers of
    interfaces for IPv6.

    Loopback always, for the other nodes of this machine; beyond it only where we listen.
    """
    host = split_scope(listen)
    places: list[str | int] = []
    for interface in interfaces:
        ips = [each.ip for each in interface.addresses]
        if listen in ANY:
            wanted: tuple[int, ...] = ANY[listen]
        elif interface.loopback:
            wanted = (4, 6)
        elif host is not None and host[0] in ips and host[1] in ("", interface.scope):
            wanted = (host[0].version,)
        else:
            continue
        four = [str(ip) for ip in ips if ip.version == 4 and 4 in wanted]
        places += four
        if 6 in wanted and any(ip.version == 6 for ip in ips) and not (interface.loopback and four):
            # Multicast over IPv6's loopback works nowhere; it is a last resort.
            places.append(interface.index)
    return tuple(places)
