"""``edgellm devices``: which devices there are, what they offer, and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from edgellm.cli import options as o
from edgellm.cli.asked import Reaching
from edgellm.cli.clusters import DeviceFacts, LinkFacts, devices_of, links_of, open_cluster
from edgellm.cli.output import emit, run, show, table, tell
from edgellm.cli.spread import spread

_SHORT_ID = 12


@spread
def devices(reaching: Reaching, as_json: o.Json = False) -> None:
    """List devices, what they offer, and their links."""

    async def work() -> None:
        async with open_cluster(reaching, reaching.settings()) as cluster:
            found = await devices_of(cluster)
            links = await links_of(cluster)
        if as_json:
            emit(as_data(found, links))
        else:
            show(as_tables(found, links))
            if len(found) == 1:
                tell("Only this device. Start another with: edgellm join (or name it with --peer).")

    run(work, as_json)


def as_data(found: Sequence[DeviceFacts], links: Sequence[LinkFacts]) -> dict[str, Any]:
    """What ``devices --json`` prints."""
    return {
        "devices": [
            {
                "id": device.device_id,
                "name": device.name,
                "address": device.address,
                "found": device.how,
                "memory_offered": device.memory_offered,
                "memory_free": device.memory_free,
                "cores": device.cores,
                "engines": list(device.engines),
                "software": device.software,
                "figures": dict(device.figures),
                "links": [
                    {
                        "to": link.target,
                        "round_trip_s": link.round_trip_s,
                        "bytes_per_s": link.bytes_per_s,
                        "problem": link.problem,
                    }
                    for link in links
                    if link.source == device.name
                ],
            }
            for device in found
        ]
    }


def as_tables(found: Sequence[DeviceFacts], links: Sequence[LinkFacts]) -> Group:
    """The same for people."""
    parts: list[Table | str] = [
        table(
            ("name", "id", "address", "found", "engines"),
            ("offers", "free", "decode", "prefill"),
            [
                (
                    device.name,
                    device.device_id[:_SHORT_ID],
                    device.address,
                    device.how,
                    ", ".join(engine for engine in device.engines if engine != "stub") or "none",
                    size(device.memory_offered),
                    size(device.memory_free),
                    "measuring"
                    if device.figures.get("measuring")
                    else scaled(device.figures.get("decode_bytes_per_s"), 1e9, "GB/s"),
                    scaled(device.figures.get("prefill_flops_per_s"), 1e9, "GFLOP/s"),
                )
                for device in found
            ],
        )
    ]
    if links:
        parts += ["", _links(links)]
    return Group(*parts)


def _links(links: Sequence[LinkFacts]) -> Table:
    return table(
        ("link",),
        ("round trip", "bandwidth", "problem"),
        [
            (
                f"{link.source} to {link.target}",
                scaled(link.round_trip_s, 1e-3, "ms"),
                scaled(link.bytes_per_s, 1e6, "MB/s"),
                link.problem,
            )
            for link in links
        ],
    )


def scaled(value: float | None, unit: float, name: str) -> str:
    """A figure in a unit, to three digits; empty for one that is not known."""
    if not value:
        return ""
    amount = value / unit
    digits = 2 if amount < 10 else 1 if amount < 100 else 0
    return f"{amount:.{digits}f} {name}"


def size(amount: int) -> str:
    """Bytes in words."""
    if amount >= 1 << 30:
        return f"{amount / 2**30:.1f} GiB"
    if amount >= 1 << 20:
        return f"{amount / 2**20:.0f} MiB"
    return f"{amount / 2**10:.0f} KiB"
