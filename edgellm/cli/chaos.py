"""``edgellm chaos``: devices die at random moments, and no token may be lost, repeated or changed.

Hidden: it is for who works on edgellm (``scripts/chaos``), and for who does not believe it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from edgellm.bench import assaults
from edgellm.bench import chaos as trials
from edgellm.bench.assaults import Assault
from edgellm.bench.faults import Damage, Fault, Series, percentiles
from edgellm.bench.orphans import coordinators_killed
from edgellm.cli import options as o
from edgellm.cli.chaostables import chaos_table
from edgellm.cli.output import emit, run, say, tell
from edgellm.errors import DeviceError
from edgellm.modelref import OpenedModel, demo_model, open_reference

STUB = "stub:12:delay=0.004"
Kills = Annotated[
    int | None,
    typer.Option("--kills", min=1, help="Kills in mid-decode, exact mode; 6, or 200 with --full."),
]
Seed = Annotated[int, typer.Option("--seed", help="Decides the moments; the same ones again.")]
Full = Annotated[bool, typer.Option("--full", help="Every fault, in full numbers: an hour.")]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of everything."""

    kills: int
    """In mid-decode and reference mode: half of them with the stub engine."""
    normal: int
    prefill: int
    stops: int
    leaves: int
    coordinators: int
    flips: int
    garbage: int
    frames: int
    """Garbage frames into the state machine alone."""
    codes: int


def extent(kills: int | None, full: bool) -> Extent:
    """The small part that the tests run, or all of it."""
    if full:
        return Extent(
            kills=kills or 200,
            normal=20,
            prefill=20,
            stops=5,
            leaves=10,
            coordinators=10,
            flips=1000,
            garbage=2000,
            frames=1_000_000,
            codes=10_000,
        )
    return Extent(
        kills=kills or 6,
        normal=2,
        prefill=2,
        stops=0,
        leaves=2,
        coordinators=1,
        flips=50,
        garbage=1000,
        frames=1000,
        codes=100,
    )


def chaos(
    model: o.Model = None,
    kills: Kills = None,
    seed: Seed = 1,
    full: Full = False,
    as_json: o.Json = False,
) -> None:
    """Let devices die at random moments, and count tokens lost, repeated and changed."""

    broken: list[str] = []

    async def work() -> None:
        much = extent(kills, full)
        opened = open_reference(model or demo_model())
        if opened.model is None:
            raise DeviceError("the fault bench needs a model file.", hint="Leave --model out.")
        series: list[Series] = []
        async with trials.fleet() as devices:
            for kind in _kinds(opened, much):
                tell(f"{kind.name}: {kind.count} trials ...")
                series.append(await trials.run_series(devices, kind, seed, tell))
            tell("garbage into a node ...")
            repelled = await assaults.garbage_into_node(devices.local, much.garbage, seed)
            tell("coordinators killed ...")  # by then that node must load stages as before
            repelled.append(await coordinators_killed(devices.local, much.coordinators))
        repelled.append(assaults.garbage_into_connections(much.frames, seed))
        tell("flipped bytes ...")
        repelled.append(await assaults.flipped_bytes(opened.model, much.flips, seed))
        repelled.append(assaults.wrong_codes(much.codes, seed, tell))
        if as_json:
            emit(report(series, repelled, seed))
        else:
            say(chaos_table(series, repelled))
        broken.extend(_broken(series, repelled))

    run(work, as_json)
    if broken:
        tell(f"Promises were broken: {', '.join(broken)}.")
        sys.exit(DeviceError.exit_code)


def _kinds(opened: OpenedModel, much: Extent) -> list[trials.Kind]:
    stub = open_reference(STUB)
    kinds = [
        *_kills("stub", stub, much.kills // 2),
        *_kills(opened.name, opened, much.kills - much.kills // 2),
        trials.Kind("normal mode", opened, Fault.KILL, much.normal, exact=False),
        trials.Kind("kill in prefill", opened, Fault.KILL, much.prefill, prefill=True),
        trials.Kind("stop, then go on", opened, Fault.STOP, much.stops),
        # Long answers: whoever leaves does so when its successor is ready.
        trials.Kind("leave", opened, Fault.LEAVE, much.leaves, tokens=440, within=40),
    ]
    return [kind for kind in kinds if kind.count]


def _kills(name: str, opened: OpenedModel, count: int) -> list[trials.Kind]:
    """In mid-decode: with a device to spare, and with none."""
    every = trials.STAGES + trials.SPARE
    return [
        trials.Kind(f"kill, {name}", opened, Fault.KILL, count - count // 2),
        trials.Kind(f"kill, {name}, no spare", opened, Fault.KILL, count // 2, stages=every),
    ]


def report(series: list[Series], repelled: list[Assault], seed: int) -> dict[str, Any]:
    """What ``--json`` prints: the kills in mid-decode summed up, and every series by itself;
    damage is that of all."""
    kills = [each for each in series if each.name.startswith("kill,")]
    damage = sum((each.damage for each in series), Damage())
    return {
        "seed": seed,
        "kills": sum(len(each.outcomes) for each in kills),
        "lost": damage.lost,
        "repeated": damage.repeated,
        "changed": damage.changed,
        "detect_s": percentiles([s for each in kills for s in each.times("detect_s")]),
        "next_token_s": percentiles([s for each in kills for s in each.times("next_token_s")]),
        "series": [each.to_dict() for each in series],
        "assaults": [each.to_dict() for each in repelled],
    }


def _broken(series: list[Series], repelled: list[Assault]) -> list[str]:
    """What a promise was broken in."""
    struck = [each.name for each in series if each.damage != Damage()]
    return struck + [each.name for each in repelled if not each.met]
