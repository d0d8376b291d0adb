"""Real node processes on loopback for the cluster tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from edgellm.client import Cluster
from edgellm.localcluster import LocalNode, local_cluster, local_devices
from tests.cluster.lan import Lan, why_not
from tests.cluster.processes import pair_homes

Started = tuple[Cluster, list[LocalNode]]
StartCluster = Callable[[int], AbstractAsyncContextManager[Started]]


@pytest.fixture
def start_cluster() -> StartCluster:
    """``async with start_cluster(3) as (cluster, nodes)``: devices a, b, c, and a client."""

    @contextlib.asynccontextmanager
    async def start(count: int) -> AsyncIterator[Started]:
        devices = local_devices(count, memory_bytes=4 << 30, processors=range(count), pin=False)
        async with (
            local_cluster(devices) as local,
            Cluster.connect(local.addresses, home=local.home) as cluster,
        ):
            yield cluster, local.nodes

    return start


@pytest.fixture(scope="session")
def permitted() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def lan(permitted: None, tmp_path: Path) -> Iterator[Lan]:
    """With devices a, b, c and x that are paired already."""
    pair_homes(*(tmp_path / name for name in "abcx"))
    made = Lan(tmp_path)
    try:
        yield made
    finally:
        made.close()
