"""``edgellm devices``: which devices there are, what they offer, and the links between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from edgellm.cli import options as o
from edgellm.cli.asked import Reaching
from edgellm.cli.clusters import (
    DeviceFacts,
    LinkFacts,
    MemberFacts,
    devices_of,
    links_of,
    members_of,
    open_cluster,
    strangers_of,
)
from edgellm.cli.output import SHORT_ID, emit, run, show, table, tell
from edgellm.cli.progress import duration
from edgellm.cli.spread import spread
from edgellm.probe import battery_note

_THERE = ("alive", "suspected")
HOT_C = 85
"""From here on, processors slow down."""
_VERBS = {"alive": "is there", "suspected": "is suspected", "gone": "is gone", "left": "left"}


@spread
def devices(reaching: Reaching, as_json: o.Json = False) -> None:
    """List devices, what they offer, and their links."""

    async def work() -> None:
        async with open_cluster(reaching, reaching.settings()) as cluster:
            found = await devices_of(cluster)
            links = await links_of(cluster)
            members = await members_of(cluster)
            strangers = await strangers_of(cluster)
        if as_json:
            emit({**as_data(found, links, members), "unpaired": strangers})
        else:
            show(as_tables(found, links, members))
            if strangers:
                tell(_of_strangers(strangers))
            elif len(found) == 1:
                tell("Only this device. To let another in: edgellm invite")

    run(work, as_json)


def _of_strangers(strangers: Sequence[Mapping[str, str]]) -> str:
    names = ", ".join(each["name"] or each["id"][:SHORT_ID] for each in strangers)
    many = "1 device" if len(strangers) == 1 else f"{len(strangers)} devices"
    verb = "is" if len(strangers) == 1 else "are"
    return (
        f"{many} on this network {verb} not paired with this one ({names})."
        " To let one in: edgellm invite"
    )


def as_data(
    found: Sequence[DeviceFacts],
    links: Sequence[LinkFacts],
    members: Sequence[MemberFacts] = (),
) -> dict[str, Any]:
    """What ``devices --json`` prints: connected devices, then those of the cluster that are not,
    with what is known of them."""
    seen = {member.device_id: member for member in members}
    connected = [
        {
            "id": device.device_id,
            "name": device.name,
            **_state(device, seen.get(device.device_id)),
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
    away = [
        {
            "id": member.device_id,
            "name": member.name,
            "state": member.state,
            "state_since_s": member.since_s,
            "problem": member.problem,
        }
        for member in _away(found, members)
    ]
    return {"devices": [*connected, *away]}


def _state(device: DeviceFacts, member: MemberFacts | None) -> dict[str, Any]:
    """Of a connected device. That it answers us counts more than what its absence looked like."""
    if member is None or member.state not in _THERE:
        return {"state": "alive", "state_since_s": None, "problem": ""}
    return {
        "state": member.state,
        "state_since_s": member.since_s,
        "problem": member.problem,
    }


def _away(found: Sequence[DeviceFacts], members: Sequence[MemberFacts]) -> list[MemberFacts]:
    connected = {device.device_id for device in found}
    return [member for member in members if member.device_id not in connected]


def as_tables(
    found: Sequence[DeviceFacts],
    links: Sequence[LinkFacts],
    members: Sequence[MemberFacts] = (),
) -> Group:
    """The same for people."""
    seen = {member.device_id: member for member in members}
    rows = [
        (
            device.name,
            device.device_id[:SHORT_ID],
            *_state_words(_state(device, seen.get(device.device_id))),
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
    ]
    away = _away(found, members)
    rows += [
        (
            member.name,
            member.device_id[:SHORT_ID],
            *_state_words({"state": member.state, "state_since_s": member.since_s}),
            *("",) * 7,
        )
        for member in away
    ]
    parts: list[Table | str] = [
        table(
            ("name", "id", "state", "since", "address", "found", "engines"),
            ("offers", "free", "decode", "prefill"),
            rows,
        )
    ]
    if links:
        parts += ["", _links(links)]
    reasons = [
        f"{each.name} {_VERBS.get(each.state, each.state)}: {each.problem}."
        for each in away
        if each.problem
    ]
    reasons += [f"{each.name} {note}." for each in found if (note := power_note(each.figures))]
    if reasons:
        parts += ["", *reasons]
    return Group(*parts)


def power_note(figures: Mapping[str, int | float]) -> str:
    """What a device runs on and how hot it is, where that is worth a word: goes on from its name;
    empty where it is not."""
    hot = figures.get("temperature_c", 0)
    heat = f"its processor has {hot:.0f} degrees" if HOT_C <= hot < 150 else ""
    note = battery_note(figures)
    if not note and figures.get("on_mains") == 0:
        note = "runs on battery"
    return "; ".join(filter(None, (note, heat)))


def _state_words(state: dict[str, Any]) -> tuple[str, str]:
    since = state["state_since_s"]
    return state["state"], "" if since is None else f"{duration(since)} ago"


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
