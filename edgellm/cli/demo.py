"""``edgellm demo``: several devices on this machine, and a model over all of them."""

from __future__ import annotations

from dataclasses import replace

import psutil

from edgellm.cli import options as o
from edgellm.cli.asked import Answering, Loading
from edgellm.cli.output import run, tell
from edgellm.cli.spread import spread
from edgellm.cli.talk import check, talk
from edgellm.client import Cluster, plan_over
from edgellm.localcluster import aside, local_cluster, local_devices, our_processors
from edgellm.planner import DeviceOffer
from edgellm.types import DeviceId

MEMORY_SHARE = 0.8
"""Of the machine's free memory, for all devices together."""


@spread
def demo(
    loading: Loading,
    answering: Answering,
    devices: o.Devices = 3,
    memory: o.Memory = None,
    pin: o.DemoPin = True,
) -> None:
    """Several devices on this machine answer together.

    Starts devices a, b, c, ..., splits a model over them, answers, and leaves nothing behind.
    """

    async def work() -> None:
        check(answering)
        options = loading.options()
        opened = await loading.open()
        total = o.parse_size(memory) * devices
        local = local_devices(
            devices,
            memory_bytes=total or int(psutil.virtual_memory().available * MEMORY_SHARE),
            processors=our_processors(),
            threads=loading.threads,
            pin=pin,
        )
        options = replace(options, use_all=options.stages is None)
        # We know what our own devices will offer: a plan that cannot be is refused before
        # anything is started.
        expected = [DeviceOffer(d.name, DeviceId(d.name), d.memory_bytes) for d in local]
        plan_over(opened, expected, options)
        tell(f"Starting {devices} devices on this machine ...")
        with aside(local):
            async with (
                local_cluster(local) as started,
                Cluster.connect(started.addresses, home=started.home) as cluster,
            ):
                plan = plan_over(opened, cluster.offers(opened.engine), options)
                await talk(cluster, opened, plan, answering, None, options)

    run(work, answering.as_json)
