"""``edgellm pull``: a model from the Hugging Face hub, so that it is here when it is needed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgellm.cli import options as o
from edgellm.cli.devices import size
from edgellm.cli.fetching import progress_to
from edgellm.cli.modelfacts import ModelFacts, facts_of
from edgellm.cli.output import emit, run, tell
from edgellm.cli.progress import shown_progress
from edgellm.errors import HubError, ModelFileError, UsageError
from edgellm.modelref import in_thread, model_library
from edgellm.settings import HubSettings, hub_settings
from edgellm.store import hub
from edgellm.store.hubname import HubName, parse_hub_name
from edgellm.store.library import HeldModel, held_model

PulledModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="hf.co/USER/REPO, with :QUANTISATION (default: Q4_K_M, else Q4, else the first) or"
        " /FILE after it.",
    ),
]


def pull(model: PulledModel, as_json: o.Json = False) -> None:
    """Fetch a model from the hub, or what is missing of it.

    A transfer that is cut off goes on where it ended. HF_TOKEN opens private models, HF_HUB_OFFLINE
    and HF_ENDPOINT are respected, files go to the Hugging Face cache (HF_HOME).
    """

    async def work() -> None:
        name = parse_hub_name(model)
        settings = hub_settings()
        here = model_library().cached(name)
        told: dict[str, Any] = {"checked": False, "fetched_bytes": 0, "resumed_bytes": 0}
        try:
            held, news = await _fetched(name, settings)
        except (HubError, UsageError) as error:
            if here is None or not (settings.offline or isinstance(error, HubError)):
                raise
            why = "HF_HUB_OFFLINE is set" if settings.offline else error.message.rstrip(".")
            tell(f"{why}; {here.name} is here already.")
            held, news = here, {}
        facts = facts_of(held)
        if facts.problem:
            raise ModelFileError(f"{facts.name} cannot be run: {facts.problem}")
        if as_json:
            emit({"model": facts.to_dict(), **told, **news})
        _say(facts, news)

    run(work, as_json)


async def _fetched(name: HubName, settings: HubSettings) -> tuple[HeldModel, dict[str, Any]]:
    """The model, and what fetching it took."""
    with shown_progress() as shown:
        pulled = await in_thread(
            lambda progress, cancel: hub.pull(name, settings, progress, cancel), progress_to(shown)
        )
    return held_model(pulled.model), {
        "checked": True,
        "commit": pulled.commit,
        "fetched_bytes": pulled.fetched_bytes,
        "resumed_bytes": pulled.resumed_bytes,
    }


def _say(facts: ModelFacts, news: dict[str, Any]) -> None:
    words = f"{facts.name}: {facts.architecture}, {facts.layers} layers, {facts.quantisation}"
    fetched = news.get("fetched_bytes", 0)
    moved = f", {size(fetched)} fetched" if fetched else ", it was here" if news else ""
    tell(f"{words}, {size(facts.nbytes)}{moved}.")
    tell(f"edgellm chat --model {facts.name}")
