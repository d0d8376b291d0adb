"""``edgellm rivals``: our planner against the rules of others, over homes at random."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from edgellm.bench.rivals import Contest, contest
from edgellm.cli import options as o
from edgellm.cli.output import emit, show, table, tell

Homes = Annotated[
    int, typer.Option("--homes", envvar="EDGELLM_HOMES", help="How many homes.", min=1, max=100_000)
]
Seed = Annotated[int, typer.Option("--seed", envvar="EDGELLM_SEED", help="Which homes.", min=0)]
_EVERY = 100


def rivals(homes: Homes = 1000, seed: Seed = 0, as_json: o.Json = False) -> None:
    """Score how others split a model against ours, by one simulator. Nothing is loaded."""

    def told(done: int) -> None:
        if done % _EVERY == 0 and done < homes:
            tell(f"{done} of {homes} homes ...")

    made = contest(homes, seed, told)
    if as_json:
        emit(dataclasses.asdict(made))
        return
    show(
        f"{made.homes} homes of 2 to 8 devices at random; ours has a plan in {made.planned},"
        f" {made.alone} of them one device alone. In {made.missed} others a rule below has one."
        " Time a token by ours; more than 1 is slower than ours."
    )
    show(as_table(made))


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
