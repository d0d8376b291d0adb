"""A model that somebody named, opened while a bar shows what is fetched of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgellm.cli.progress import Progressed, shown_progress
from edgellm.modelref import HUB, OpenedModel, opened_reference
from edgellm.store.hub import Progress
from edgellm.store.hubname import is_hub_name


@dataclass(frozen=True, slots=True)
class Fetched:
    """What ``shown_progress`` draws: bytes of a model."""

    part: str
    done: int
    total: int
    index: int = 0


async def opened_model(model: str, *, copy: bool = True) -> OpenedModel:
    """See ``modelref.open_reference``."""
    if not is_hub_name(model):
        return await opened_reference(model)
    with shown_progress() as shown:
        return await opened_reference(model, progress_to(shown), copy=copy)


def progress_to(shown: Callable[[str, Progressed], None]) -> Progress:
    """Tell ``shown_progress`` of a download."""
    return lambda what, done, total: shown(HUB, Fetched(what, done, total))
