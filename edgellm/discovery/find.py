"""Looking for devices for a few seconds, without being one: for commands that only ask.

Nothing is announced and nobody is dialed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from edgellm.discovery.base import Discovery, Sighting
from edgellm.discovery.known import KnownDevices
from edgellm.discovery.mdns import MdnsDiscovery
from edgellm.discovery.static import StaticDiscovery
from edgellm.settings import NodeSettings

_EVERYWHERE = "::"


async def find_devices(
    settings: NodeSettings,
    within_s: float,
    *,
    stop: asyncio.Event | None = None,
    everywhere: bool = False,
    ways: Sequence[Discovery] | None = None,
    on_problem: Callable[[str], None] = lambda problem: None,
) -> AsyncGenerator[Sighting, None]:
    """Sightings as they come, for ``within_s`` seconds, or until ``stop`` is set or the generator
    is closed: told peers first, then those known from last time, then who answers by mDNS.

    Multicast is asked where ``settings.listen`` is, or on all networks with ``everywhere``. One
    device may be seen more than once. ``ways`` replaces the usual ones.
    """
    if ways is None:
        ways = usual_ways(settings, everywhere, on_problem)
    queue: asyncio.Queue[Sighting] = asyncio.Queue()
    over = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        for way in ways:
            await way.start(queue.put_nowait)
        ends = asyncio.get_running_loop().time() + within_s
        while not over.done():
            getting = asyncio.create_task(queue.get())
            left = ends - asyncio.get_running_loop().time()
            try:
                await asyncio.wait(
                    (getting, over), timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                if not getting.done():
                    getting.cancel()
            if over.done() or not getting.done() or getting.cancelled():
                return
            yield getting.result()
    finally:
        over.cancel()
        await asyncio.gather(*(way.close() for way in ways))


def usual_ways(
    settings: NodeSettings, everywhere: bool, on_problem: Callable[[str], None]
) -> tuple[Discovery, ...]:
    """Told peers; and, where discovery is on, last-known devices and mDNS."""
    ways: tuple[Discovery, ...] = (StaticDiscovery(settings.peers),)
    if settings.discovery:
        listen = _EVERYWHERE if everywhere else settings.listen
        mdns = MdnsDiscovery(listen, on_problem=on_problem)
        ways = (*ways, KnownDevices(settings.home), mdns)
    return ways
