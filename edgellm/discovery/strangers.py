"""Devices that were seen and do not belong to us: kept in mind until they do, never dialed. Pure.

A device may be seen before we are told that it was let in, so every sighting is kept; people are
told only of those that are really here: that announce themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgellm.discovery.addresses import format_address
from edgellm.discovery.base import MAX_DEVICES, How, Sighting

UNPAIRED = "unpaired"


class Strangers:
    """At most ``MAX_DEVICES`` of them: the first to come stay, so that a flood of false ones
    displaces nobody."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, How], Sighting] = {}

    def saw(self, sighting: Sighting) -> None:
        """The latest of each kind counts."""
        key = (sighting.device_id, sighting.how)
        if key in self._seen or len(self._seen) < MAX_DEVICES:
            self._seen[key] = sighting

    def announced(self) -> tuple[Sighting, ...]:
        """Those that announce themselves on a network that we listen on."""
        return tuple(each for each in self._seen.values() if each.how is How.MDNS)

    def take(self, trusted: Callable[[str], bool]) -> list[Sighting]:
        """Those that are no strangers any more; they are kept no longer."""
        known = [key for key in self._seen if trusted(key[0])]
        return [self._seen.pop(key) for key in known]


def stranger_facts(sighting: Sighting) -> dict[str, Any]:
    """A stranger as plain data, beside those of the cluster: see ``cluster.facts``."""
    return {
        "device_id": sighting.device_id,
        "name": sighting.name,
        "state": UNPAIRED,
        "address": format_address(*sighting.addresses[0]),
    }
