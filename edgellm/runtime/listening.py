"""Where a node listens: every address that it was told to, on one port."""

from __future__ import annotations

from edgellm.discovery.addresses import ANY, LOOPBACK_OF, Address, own_addresses, split_scope
from edgellm.discovery.interfaces import machine_interfaces
from edgellm.errors import PeerLostError, UsageError
from edgellm.settings import LOOPBACK
from edgellm.transport.base import Listener, OnStream, Transport

_SAME_PORT_TRIES = 8


async def listen(
    transport: Transport, address: str, port: int, on_stream: OnStream
) -> list[Listener]:
    """Listeners for ``address`` (0.0.0.0 is all IPv4 ones of this machine, :: all it has), each at
    the same port; 0 lets the system choose.

    Raises UsageError for an address that is not this machine's, PeerLostError for a port that
    cannot be had.
    """
    for last in range(_SAME_PORT_TRIES - 1, -1, -1):
        opened: list[Listener] = []
        try:
            for host in _hosts(address):
                chosen = opened[0].address[1] if opened else port
                opened.append(await transport.listen(host, chosen, on_stream))
        except BaseException as error:
            for listener in opened:
                await listener.close()
            if not isinstance(error, PeerLostError):
                raise
            if not _is_ours(address):
                raise UsageError(
                    f"this machine has no address {address} to listen on.",
                    hint=f"Use one of its own, {LOOPBACK}, or 0.0.0.0 for all networks.",
                ) from None
            # The port that was free for one of two addresses need not be for the other.
            if not opened or port or not last:
                raise
        else:
            return opened
    raise AssertionError("the last try returns or raises")


def near_address(address: str, port: int) -> Address:
    """Where others on this machine are to connect: over loopback if that is possible, so that
    both sides know that they share a disk."""
    versions = ANY.get(address)
    if versions is None:
        return own_addresses(address, port, machine_interfaces())[0]
    return LOOPBACK_OF[versions[0]], port


def _hosts(address: str) -> tuple[str, ...]:
    """What to bind. ``::`` alone is IPv6 only, as asyncio binds it."""
    if address == "localhost":
        return (LOOPBACK,)
    if ANY.get(address) != (4, 6):
        return (address,)
    six = any(a.version == 6 for i in machine_interfaces() for a in i.addresses)
    four = next(host for host, versions in ANY.items() if versions == (4,))
    return (address, four) if six else (four,)


def _is_ours(address: str) -> bool:
    parts = split_scope(address)
    if address in ANY or parts is None:
        return True
    ours = {each.ip for interface in machine_interfaces() for each in interface.addresses}
    return parts[0] in ours or parts[0].is_loopback
