"""``/v1/cluster`` as a stream: the picture of the cluster, once a second, as server-sent events."""

from __future__ import annotations

import asyncio

from edgellm.api.live import Live
from edgellm.api.sse import Outbox, Producer, event

EVERY_S = 1.0


def cluster_stream(live: Live, every_s: float = EVERY_S) -> Producer:
    """Puts an event named ``cluster`` into the box now and every ``every_s`` seconds."""

    async def produce(box: Outbox) -> None:
        while True:
            box.put(event(await live.picture(), "cluster"))
            await asyncio.sleep(every_s)

    return produce
