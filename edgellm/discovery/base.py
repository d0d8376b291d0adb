"""What a way of finding devices is, and what it finds. No input or output.

Everything that a stranger may have written passes ``sighting_from`` before it becomes a
``Sighting``: names are printable, addresses are addresses, nothing is longer than it may be.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from edgellm.discovery.addresses import Address, is_usable
from edgellm.settings import is_name

MAX_ADDRESSES = 16
"""Of one device."""
MAX_DEVICES = 256
"""That are kept in mind at once."""
_ID = re.compile("[0-9a-f]{64}")


class How(enum.StrEnum):
    """Where a sighting comes from."""

    MDNS = "mdns"
    TOLD = "told"
    """A person said so (``--peer``)."""
    KNOWN = "known"
    """It was there last time."""
    GOSSIP = "gossip"
    """Another device, or the device itself, said so over a connection."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A device may be at one of these addresses."""

    device_id: str
    """64 hex digits; empty where only an address was told."""
    name: str
    """Empty where it is not known. Only the device's greeting says what it is called."""
    addresses: tuple[Address, ...]
    how: How
    invites: bool = False
    """Whether it says that it lets a new device in at the moment."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node lets others know of itself."""

    device_id: str
    name: str
    port: int
    invites: bool = False
    """Whether an invitation is open here."""


OnSighting: TypeAlias = Callable[[Sighting], None]


class Discovery(Protocol):
    """One way of finding devices."""

    async def start(self, on_sighting: OnSighting) -> None:
        """Begin to look, and to announce ourselves if that is part of it. Returns at once and
        raises nothing: a way that does not work here finds nobody.

        ``on_sighting`` is called from the event loop, any number of times for one device. There is
        no call for a device that is not seen any more: that proves nothing.
        """
        ...

    async def close(self) -> None:
        """Stop looking; nothing is called afterwards."""
        ...


def is_device_id(text: object) -> bool:
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def sighting_from(
    device_id: object,
    name: object,
    addresses: Iterable[object],
    how: How,
    *,
    invites: bool = False,
) -> Sighting | None:
    """A sighting of what somebody claims; None where nothing of it can be used."""
    if not isinstance(device_id, str) or not is_device_id(device_id):
        return None
    usable: list[Address] = []
    for address in addresses:
        if is_usable(address) and address not in usable:
            usable.append(address)
            if len(usable) == MAX_ADDRESSES:
                break
    if not usable:
        return None
    shown = name if isinstance(name, str) and is_name(name) else ""
    return Sighting(device_id, shown, tuple(usable), how, invites)
