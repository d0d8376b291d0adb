"""Discovery without a network, for tests: everyone on one ``MemoryGround`` sees the others."""

from __future__ import annotations

from edgellm.discovery.base import OnSighting, Sighting


class MemoryGround:
    """What multicast is for the real thing."""

    def __init__(self) -> None:
        self._announced: list[Sighting] = []
        self._listening: list[OnSighting] = []
        self.silent = False
        """Multicast is lost: nobody hears of anybody any more."""

    def discovery(self, me: Sighting | None) -> MemoryDiscovery:
        """A way to announce ``me``, or only to look."""
        return MemoryDiscovery(self, me)

    def announce(self, sighting: Sighting) -> None:
        """What any member of the ground may claim."""
        if not self.silent:
            self._announced.append(sighting)
            for hears in list(self._listening):
                hears(sighting)

    def join(self, on_sighting: OnSighting) -> None:
        self._listening.append(on_sighting)
        for sighting in [] if self.silent else list(self._announced):
            on_sighting(sighting)

    def leave(self, on_sighting: OnSighting, me: Sighting | None) -> None:
        if on_sighting in self._listening:
            self._listening.remove(on_sighting)
        if me in self._announced:
            self._announced.remove(me)


class MemoryDiscovery:
    """A ``Discovery`` on a ground. Made by ``MemoryGround.discovery``."""

    def __init__(self, ground: MemoryGround, me: Sighting | None) -> None:
        self._ground = ground
        self._me = me
        self._on_sighting: OnSighting | None = None

    async def start(self, on_sighting: OnSighting) -> None:
        self._on_sighting = on_sighting
        self._ground.join(on_sighting)
        if self._me is not None:
            self._ground.announce(self._me)

    async def close(self) -> None:
        if self._on_sighting is not None:
            self._ground.leave(self._on_sighting, self._me)
            self._on_sighting = None
