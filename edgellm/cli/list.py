"""``edgellm list``: the models that are on this device."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from edgellm.cli import options as o
from edgellm.cli.devices import size
from edgellm.cli.modelfacts import ModelFacts, facts_of
from edgellm.cli.output import emit, run, show, table, tell
from edgellm.modelref import model_library
from edgellm.settings import hub_settings, streamed_folder
from edgellm.store.hubcache import HubCache
from edgellm.store.hubstream import known


def list(as_json: o.Json = False) -> None:
    """List the models on this device: those of the Hugging Face cache, those in the folder of
    models (below EDGELLM_HOME), and the bundled one.

    Each can be named with --model as it is shown.
    """

    async def work() -> None:
        models = [facts_of(held) for held in model_library().all()]
        elsewhere = known(streamed_folder())
        unfinished = HubCache(hub_settings().cache).unfinished()
        if as_json:
            emit(
                {
                    "models": [each.to_dict() for each in models],
                    "without_copy": [
                        {"name": name, "bytes": nbytes} for name, nbytes in elsewhere.items()
                    ],
                    "unfinished": [
                        {"name": f"hf.co/{repo}", "bytes": nbytes}
                        for repo, nbytes in unfinished.items()
                    ],
                }
            )
            return
        if models:
            show(as_table(models))
        for name, nbytes in elsewhere.items():
            tell(f"Known without a copy here: {name}, {size(nbytes)} on the hub.")
        for repo, nbytes in unfinished.items():
            tell(
                f"Not finished: {size(nbytes)} of hf.co/{repo}. edgellm pull goes on, edgellm rm"
                f" hf.co/{repo} removes it."
            )
        if not models:
            tell("There is no model here yet. edgellm pull hf.co/USER/REPO fetches one.")

    run(work, as_json)


def as_table(models: Sequence[ModelFacts]) -> Table:
    """A line a model."""
    return table(
        ("model", "architecture", "weights", "where"),
        ("layers", "size"),
        [
            (
                each.name,
                each.architecture or each.problem,
                each.quantisation,
                each.where,
                str(each.layers or ""),
                size(each.nbytes),
            )
            for each in models
        ],
    )
