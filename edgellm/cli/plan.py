"""``edgellm plan``: which device would run which layers, and why; nothing is loaded."""

from __future__ import annotations

from typing import Any

from rich.console import Group

from edgellm.answer import plan_to_dict
from edgellm.cli import options as o
from edgellm.cli.asked import Loading, Reaching
from edgellm.cli.clusters import open_cluster
from edgellm.cli.devices import scaled, size
from edgellm.cli.output import emit, run, show, table
from edgellm.cli.spread import spread
from edgellm.modelref import OpenedModel
from edgellm.planner import Explained, Prediction


@spread
def plan(loading: Loading, reaching: Reaching, as_json: o.Json = False) -> None:
    """Show how a model would be split, and why.

    Nothing is loaded.
    """

    async def work() -> None:
        options = loading.options()
        opened = await loading.open()
        async with open_cluster(reaching, reaching.settings(loading.threads)) as cluster:
            explained = await cluster.plan(opened, options)
        if as_json:
            emit(as_data(opened, explained))
        else:
            show(as_tables(opened, explained))

    run(work, as_json)


def as_data(opened: OpenedModel, explained: Explained) -> dict[str, Any]:
    """What ``plan --json`` prints; seconds and bytes."""
    solo = explained.solo
    return {
        "model": opened.name,
        "plan": plan_to_dict(explained.plan),
        "prediction": prediction_data(explained.prediction),
        "solo": solo and {"device": solo.device, **prediction_data(solo.prediction)},
        "left_out": [
            {
                "device": left.device,
                "reason": left.reason,
                "with_it": left.with_it and prediction_data(left.with_it),
            }
            for left in explained.left_out
        ],
        "why": explained.plan.why,
    }


def as_tables(opened: OpenedModel, explained: Explained) -> Group:
    """The same for people."""
    made, expected = explained.plan, explained.prediction
    settings = made.settings
    stages = table(
        ("device",),
        ("layers", "of", "memory", "offered", "a token", "a chunk", "sending on", "speed"),
        [
            (
                stage.device,
                f"{stage.span.first} to {stage.span.end - 1}",
                str(made.layers),
                size(stage.memory_bytes),
                size(stage.memory_offered),
                scaled(stage.decode_s, 1e-3, "ms"),
                scaled(stage.chunk_s, 1e-3, "ms"),
                scaled(stage.link_s, 1e-3, "ms"),
                "measured" if stage.measured else "assumed",
            )
            for stage in expected.stages
        ],
    )
    return Group(
        f"{opened.name}: context {settings.context} tokens, KV cache {settings.kv_type},"
        f" {settings.activations.value} between devices.",
        "",
        stages,
        "",
        made.why,
    )


def prediction_data(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain data."""
    return {
        "prompt_tokens": prediction.workload.prompt_tokens,
        "ttft_s": prediction.ttft_s,
        "tpot_s": prediction.tpot_s,
        "tokens_per_s": 1 / prediction.tpot_s if prediction.tpot_s else None,
        "measured": prediction.measured,
        "bottleneck": prediction.bottleneck,
        "stages": [
            {
                "device": stage.device,
                "layers": [stage.span.first, stage.span.end],
                "memory_bytes": stage.memory_bytes,
                "memory_offered": stage.memory_offered,
                "decode_s": stage.decode_s,
                "chunk_s": stage.chunk_s,
                "link_s": stage.link_s,
                "measured": stage.measured,
            }
            for stage in prediction.stages
        ],
    }
