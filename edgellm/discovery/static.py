"""Addresses that somebody typed (``--peer HOST:PORT``): always looked for, never forgotten.

They only become sightings here; who keeps trying them, and how often, is the directory's matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.discovery.addresses import Address
from edgellm.discovery.base import How, OnSighting, Sighting


class StaticDiscovery:
    """Sees each address once, without knowing which device is there."""

    def __init__(self, peers: Sequence[Address]) -> None:
        self._peers = tuple(dict.fromkeys(peers))

    async def start(self, on_sighting: OnSighting) -> None:
        for address in self._peers:
            on_sighting(Sighting("", "", (address,), How.TOLD))

    async def close(self) -> None:
        """Nothing runs."""
