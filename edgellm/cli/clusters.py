"""The one place where the commands meet ``client.Cluster``: what they ask of it, as plain facts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.cli.asked import Reaching
from edgellm.cli.output import tell
from edgellm.client import MEASURE_WAIT_S, Cluster
from edgellm.discovery.addresses import format_address
from edgellm.settings import NodeSettings


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device as ``edgellm devices`` shows it. Bytes; figures as the device measured them."""

    name: str
    device_id: str
    address: str
    how: str
    """How it was found, in a word or two."""
    memory_offered: int
    memory_free: int
    cores: int
    software: str
    engines: tuple[str, ...]
    figures: Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """From one device to another. Not measured where there is a problem."""

    source: str
    target: str
    round_trip_s: float | None
    bytes_per_s: float | None
    problem: str


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """A device of the cluster, there or not, as this device's node has seen it since it started."""

    name: str
    device_id: str
    state: str
    """``alive``, ``suspected``, ``gone`` or ``left``."""
    since_s: float
    """Seconds that it has been in this state."""
    problem: str
    """Why it is not alive; empty where it is."""


@contextlib.asynccontextmanager
async def open_cluster(reaching: Reaching, local: NodeSettings) -> AsyncIterator[Cluster]:
    """This device and the others that can be found, connected."""
    if local.discovery and reaching.wait:
        tell("Looking for devices ...")
    peers = tuple(reaching.peer or ())
    async with Cluster.open(peers, local=local, wait_s=reaching.wait) as cluster:
        yield cluster


async def devices_of(cluster: Cluster) -> list[DeviceFacts]:
    """The connected devices, this one first, with what they measured of themselves. Waits a
    little for those that are measuring."""
    return [
        DeviceFacts(
            name=peer.info.name,
            device_id=peer.info.device_id,
            address=format_address(peer.host, peer.port),
            how=peer.how,
            memory_offered=peer.info.memory_total,
            memory_free=peer.info.memory_free,
            cores=peer.info.cores,
            software=peer.info.software,
            engines=tuple(peer.info.engines),
            figures=dict(peer.info.figures),
        )
        for peer in await cluster.refreshed(MEASURE_WAIT_S)
    ]


async def members_of(cluster: Cluster) -> list[MemberFacts]:
    """The devices of the cluster, those that are not there included."""
    return [
        MemberFacts(
            name=str(member.get("name", "")),
            device_id=str(member.get("device_id", "")),
            state=str(member.get("state", "")),
            since_s=float(member.get("since_s") or 0.0),
            problem=str(member.get("problem", "")),
        )
        for member in await cluster.members()
    ]


async def strangers_of(cluster: Cluster) -> list[dict[str, str]]:
    """Devices on our networks that are not paired with this one: ``id``, ``name``, ``address``, as
    they say of themselves."""
    return [
        {
            "id": str(stranger.get("device_id", "")),
            "name": str(stranger.get("name", "")),
            "address": str(stranger.get("address", "")),
        }
        for stranger in await cluster.strangers()
    ]


async def links_of(cluster: Cluster) -> list[LinkFacts]:
    """Every link between two devices, measured or with the reason why not."""
    return [
        LinkFacts(
            source=link.source,
            target=link.target,
            round_trip_s=link.round_trip_s or None,
            bytes_per_s=link.bytes_per_s or None,
            problem=link.problem,
        )
        for link in await cluster.links()
    ]


async def stages_of(cluster: Cluster) -> Sequence[Mapping[str, Any]]:
    """The stages that devices have loaded, each with ``device``, ``model``, ``layers`` [first,
    end), ``stage``, ``stages``, ``memory_bytes``, ``coordinator``, ``since_s``, ``ready``."""
    return await cluster.stages()
