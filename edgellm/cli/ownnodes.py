"""Commands that are for this device's own node: whether it runs, and a conversation with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from edgellm.discovery.addresses import Address, parse_address
from edgellm.identity import TrustStore
from edgellm.node import SOFTWARE, credentials_of
from edgellm.runtime.ownnode import OwnNode, own_node
from edgellm.runtime.session import Introduction
from edgellm.store.home import HomeBusyError, HomeLock
from edgellm.transport.secure import SecureTransport

_STARTING_S = 3.0
"""How long a node that holds its home may take until it says where it listens."""
_LOOK_EVERY_S = 0.05


async def running_at(home: Path) -> Address | None:
    """Where the node with this home listens; None where none runs.

    Raises HomeBusyError for one that does not say where.
    """
    until = asyncio.get_running_loop().time() + _STARTING_S
    while True:
        lock = HomeLock(home)
        try:
            lock.acquire()
        except HomeBusyError as busy:
            if busy.address:
                return parse_address(busy.address)
            if asyncio.get_running_loop().time() > until:
                raise
            await asyncio.sleep(_LOOK_EVERY_S)
        else:
            lock.release()
            return None


@contextlib.asynccontextmanager
async def talking(trust: TrustStore, address: Address, name: str) -> AsyncIterator[OwnNode]:
    """A conversation with this device's node at ``address``. Raises PeerLostError."""
    transport = SecureTransport(credentials_of(trust))
    me = Introduction(name, trust.identity.device_id, SOFTWARE)
    async with own_node(transport, address, me) as node:
        yield node
