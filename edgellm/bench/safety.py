"""What safety costs: the same stages with encryption and heartbeats, and without.

Two clusters on the same processors, each with the model loaded, take turns. The journal is the list
of tokens that a request is: it cannot be left out, and is part of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from edgellm.bench.pairs import DECODE_PROMPT, Case, Result, Tell, measure_case
from edgellm.bench.speed import Bench, bench_devices, our_cluster
from edgellm.localcluster import LocalDevice, aside

CASES = (Case("safety", DECODE_PROMPT, 64, "tpot_s", 1.03, speedup=False),)


async def measure_safety(bench: Bench, tell: Tell) -> list[Result]:
    """Run it; a minute or two at the default counts."""
    devices = bench_devices(bench)
    with aside(devices):
        async with AsyncExitStack() as stack:
            models = []
            for safe in (False, True):
                clusters = our_cluster(_as(devices, safe), bench.apart)
                cluster = await stack.enter_async_context(clusters)
                loaded = cluster.load(bench.opened, bench.options)
                models.append(await stack.enter_async_context(loaded))
            bare, safely = models
            return [
                await measure_case(case, bench.pairs, bare, safely, tell) for case in bench.cases
            ]


def _as(devices: Sequence[LocalDevice], secure: bool) -> list[LocalDevice]:
    return [replace(device, secure=secure) for device in devices]
