"""``edgellm rm``: a model of this device that is not needed any more."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgellm.cli import options as o
from edgellm.cli.devices import size
from edgellm.cli.output import emit, run, tell
from edgellm.errors import UsageError
from edgellm.modelref import model_library
from edgellm.settings import hub_settings, streamed_folder
from edgellm.store.hubcache import HubCache
from edgellm.store.hubname import is_hub_name, parse_hub_name
from edgellm.store.hubstream import forget
from edgellm.store.library import HeldModel, ModelLibrary

Removed = Annotated[
    str, typer.Argument(metavar="MODEL", help="Its name, as edgellm list shows it.")
]
Yes = Annotated[bool, typer.Option("--yes", envvar="EDGELLM_YES", help="Do not ask.")]


def rm(model: Removed, yes: Yes = False, as_json: o.Json = False) -> None:
    """Remove a model from the Hugging Face cache or from the folder of models.

    Files elsewhere are not touched.
    """

    async def work() -> None:
        library = model_library()
        held = _held(library, model)
        cache = HubCache(hub_settings().cache)
        repo = parse_hub_name(model).repo if is_hub_name(model) else ""
        parts = cache.unfinished().get(repo, 0)
        if held is None and not parts and repo and forget(streamed_folder(), parse_hub_name(model)):
            if as_json:
                emit({"removed": model, "freed_bytes": 0})
            tell(f"{model} is not known here any more; there was no copy of it.")
            return
        if held is None and not parts:
            raise UsageError(
                f"there is no model {model[:200]!r} here to be removed.",
                hint="edgellm list shows those there are. Files elsewhere are yours to delete.",
            )
        name = held.name if held else f"the unfinished parts of hf.co/{repo}"
        nbytes = (held.nbytes if held else 0) + parts
        if not yes and not _agreed(f"Remove {name} ({size(nbytes)})?"):
            tell("Nothing was removed.")
            if as_json:
                emit({"removed": None, "freed_bytes": 0})
            return
        freed = cache.drop_unfinished(repo) if parts else 0
        freed += library.remove(held) if held else 0
        if as_json:
            emit({"removed": held.name if held else f"hf.co/{repo}", "freed_bytes": freed})
        tell(f"Removed {name}: {size(freed)} are free again.")

    run(work, as_json)


def _held(library: ModelLibrary, model: str) -> HeldModel | None:
    if is_hub_name(model):
        return library.cached(parse_hub_name(model))
    return library.named(model)


def _agreed(question: str) -> bool:
    """Ask on the terminal. Raises UsageError where there is none."""
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise UsageError("nobody is there to be asked.", hint="Say --yes to remove it.")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
