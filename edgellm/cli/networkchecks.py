"""Whether other devices can be found and reached from here: interfaces, ports, multicast."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Sequence

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceInfo, ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

from edgellm.cli.checks import Check, Status
from edgellm.discovery.interfaces import machine_interfaces
from edgellm.settings import LOOPBACK

KIND = "_edgellm-test._tcp.local."
"""Not the one of devices: nobody else should take notice."""
HEARD_WITHIN_S = 2.0
_PEER_FIX = "Name devices with --peer HOST:PORT"


def addresses() -> list[tuple[str, str]]:
    """(interface, address) of everything that is up, those that others can reach first."""
    found = [
        (interface.name, str(address.ip))
        for interface in machine_interfaces()
        for address in interface.addresses
    ]
    return sorted(found, key=lambda each: ipaddress.ip_address(each[1]).is_loopback)


def check_interfaces(found: Sequence[tuple[str, str]]) -> Check:
    told = ", ".join(f"{name} {address}" for name, address in found) or "none"
    if not any(_outside(address) for _, address in found):
        return Check(
            "interfaces", Status.WARN, f"{told}: no network beside this machine's own",
            "Connect to a network to use other machines.",
        )  # fmt: skip
    return Check("interfaces", Status.OK, told)


def check_port(address: str, port: int) -> Check:
    """Whether a node could listen there; port 0 is any."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((address, port))
            listener.listen()
            bound = listener.getsockname()[1]
    except OSError as error:
        return Check(
            "port", Status.FAIL, f"nothing can listen on {address} port {port}: {error.strerror}",
            "Choose another one with --port, or --listen.",
        )  # fmt: skip
    return Check("port", Status.OK, f"{address}:{bound} can be listened on")


async def check_discovery(found: Sequence[tuple[str, str]]) -> Check:
    """Announce something by mDNS and look for it: on the first network that others are on,
    rather by IPv4."""
    usable = sorted(found, key=lambda each: (not _outside(each[1]), ":" in each[1]))
    name, address = usable[0] if usable else ("loopback", LOOPBACK)
    try:
        async with asyncio.timeout(HEARD_WITHIN_S):
            heard = await _hears_itself(name, address)
    except TimeoutError:
        heard = False
    except (OSError, ZeroconfError) as error:
        return Check("discovery", Status.WARN, f"no multicast on {name}: {error}", f"{_PEER_FIX}.")
    if not heard:
        return Check(
            "discovery",
            Status.WARN,
            f"multicast on {name} ({address}) is not heard",
            f"{_PEER_FIX}, or let UDP port 5353 through this machine's firewall.",
        )
    return Check("discovery", Status.OK, f"mDNS works on {name} ({address})")


async def _hears_itself(name: str, address: str) -> bool:
    six = ":" in address
    family = socket.AF_INET6 if six else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as ours:
        ours.bind((address, 0))  # zeroconf would lose a socket over an address that is gone
    interfaces: list[str | int] = [socket.if_nametoindex(name) if six else address]
    version = IPVersion.V6Only if six else IPVersion.V4Only
    speaker = AsyncZeroconf(interfaces=interfaces, ip_version=version)
    try:
        listener = AsyncZeroconf(interfaces=interfaces, ip_version=version)
        heard = asyncio.Event()
        wanted = f"doctor-{secrets.token_hex(4)}"

        def on_change(
            zeroconf: object, service_type: str, name: str, state_change: ServiceStateChange
        ) -> None:
            if name == f"{wanted}.{KIND}" and state_change is ServiceStateChange.Added:
                heard.set()

        try:
            browser = AsyncServiceBrowser(listener.zeroconf, KIND, handlers=[on_change])
            info = ServiceInfo(
                KIND,
                f"{wanted}.{KIND}",
                addresses=[socket.inet_pton(family, address)],
                port=9,
                server=f"{wanted}.local.",
            )
            await speaker.async_register_service(info, cooperating_responders=True)
            await heard.wait()
            await browser.async_cancel()
        finally:
            await listener.async_close()
    finally:
        await speaker.async_close()
    return True


def _outside(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return not ip.is_loopback and not (ip.version == 6 and ip.is_link_local)
