"""``edgellm rivals``: our planner against the rules of others, over homes at random."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from edgellm.bench.rivals import Contest, Search, contest, searches
from edgellm.cli import options as o
from edgellm.cli.output import emit, show, table, tell

Homes = Annotated[
    int, typer.Option("--homes", envvar="EDGELLM_HOMES", help="How many homes.", min=1, max=100_000)
]
Seed = Annotated[int, typer.Option("--seed", envvar="EDGELLM_SEED", help="Which homes.", min=0)]
Searching = Annotated[
    bool,
    typer.Option("--search", help="Also time how long ours looks for a plan in large clusters."),
]
_EVERY = 100


def rivals(
    homes: Homes = 1000, seed: Seed = 0, searching: Searching = False, as_json: o.Json = False
) -> None:
    """Score how others split a model against ours, by one simulator. Nothing is loaded."""

    def told(done: int) -> None:
        if done % _EVERY == 0 and done < homes:
            tell(f"{done} of {homes} homes ...")

    made = contest(homes, seed, told)
    searched = tuple(searches()) if searching else ()
    if as_json:
        timed = {"searches": [dataclasses.asdict(one) for one in searched]} if searching else {}
        emit(dataclasses.asdict(made) | timed)
        return
    show(
        f"{made.homes} homes of 2 to 8 devices at random; ours has a plan in {made.planned},"
        f" {made.alone} of them one device alone. In {made.missed} others a rule below has one."
        " Time a token by ours; more than 1 is slower than ours."
    )
    show(as_table(made))
    if searching:
        show(search_table(searched))


def as_table(made: Contest) -> Table:
    """A row for each rule."""
    return table(
        ("rule",),
        ("fits", "does not", "median", "worst", "faster than ours"),
        [
            (
                one.name,
                str(one.fits),
                str(one.short),
                f"{one.median:.2f} x" if one.fits else "-",
                f"{one.worst:.1f} x" if one.fits else "-",
                str(one.better),
            )
            for one in made.rivals
        ],
    )


def search_table(searched: tuple[Search, ...]) -> Table:
    """How long each search took, and how near to the best its plan is proven to be."""
    return table(
        ("objective",),
        ("devices", "layers", "seconds", "aim", "above the bound"),
        [
            (
                one.objective,
                str(one.devices),
                str(one.layers),
                f"{one.seconds:.2f}",
                f"<= {one.target_s:.0f}",
                f"{one.gap:.2%}",
            )
            for one in searched
        ],
    )
