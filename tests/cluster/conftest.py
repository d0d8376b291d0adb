"""Real node processes on loopback for the cluster tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest

from edgellm.client import Cluster
from edgellm.localcluster import LocalNode, local_cluster, local_devices

Started = tuple[Cluster, list[LocalNode]]
StartCluster = Callable[[int], AbstractAsyncContextManager[Started]]


@pytest.fixture
def start_cluster() -> StartCluster:
    """``async with start_cluster(3) as (cluster, nodes)``: devices a, b, c, and a client."""

    @contextlib.asynccontextmanager
    async def start(count: int) -> AsyncIterator[Started]:
        devices = local_devices(count, memory_bytes=4 << 30, processors=range(count), pin=False)
        async with (
            local_cluster(devices) as nodes,
            Cluster.connect([node.address for node in nodes]) as cluster,
        ):
            yield cluster, nodes

    return start
