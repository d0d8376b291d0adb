"""``edgellm ps``: which models run where, and for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from edgellm.cli import options as o
from edgellm.cli.asked import Reaching
from edgellm.cli.clusters import open_cluster, stages_of
from edgellm.cli.devices import size
from edgellm.cli.output import emit, run, show, table, tell
from edgellm.cli.progress import duration
from edgellm.cli.spread import spread


@spread
def ps(reaching: Reaching, as_json: o.Json = False) -> None:
    """List loaded models: where, since when, for whom."""

    async def work() -> None:
        async with open_cluster(reaching, reaching.settings()) as cluster:
            stages = await stages_of(cluster)
        if as_json:
            emit({"stages": [dict(stage) for stage in stages]})
        elif stages:
            show(as_table(stages))
        else:
            tell("No model is loaded.")

    run(work, as_json)


def as_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """A line a stage. What a device does not tell stays empty."""
    return table(
        ("device", "model", "for"),
        ("layers", "stage", "memory", "tokens", "since"),
        [
            (
                _text(stage, "device"),
                _text(stage, "model"),
                _text(stage, "coordinator"),
                _layers(stage.get("layers")),
                f"{stage.get('stage', 0) + 1} of {stage.get('stages', 1)}",
                size(stage.get("memory_bytes", 0)),
                _text(stage, "tokens"),
                _since(stage),
            )
            for stage in stages
        ],
    )


def _text(stage: Mapping[str, Any], key: str) -> str:
    return str(stage.get(key, ""))


def _since(stage: Mapping[str, Any]) -> str:
    if not stage.get("ready", True):
        return "loading"
    return f"{duration(stage['since_s'])} ago" if "since_s" in stage else ""


def _layers(span: object) -> str:
    if isinstance(span, (list, tuple)) and len(span) == 2:
        return f"{span[0]} to {span[1] - 1}"
    return ""
