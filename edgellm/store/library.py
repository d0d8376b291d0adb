"""The models that are on this device by name: in the Hugging Face cache, in the user's folder of
models, and the bundled one.

Blocking, but quick; nothing here uses a network. The folder of models is the user's own: whatever
GGUF file or ONNX folder is put there can be named by its short name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from edgellm.errors import UsageError
from edgellm.store.disk import disk_errors
from edgellm.store.hubcache import CachedModel, HubCache, files_below
from edgellm.store.hubfiles import Choice, ggufs, graphs
from edgellm.store.hubname import HubName

_SHORT = re.compile(r"[\w.-]+(/[\w.-]+){0,3}(:[\w.-]+)?")
_PART = re.compile(r"-00001-of-\d{5}$")


class Where(StrEnum):
    """Where a model is."""

    HUB = "hugging face cache"
    FOLDER = "models folder"
    BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model on this disk, not read yet."""

    name: str
    """What ``--model`` takes."""
    where: Where
    nbytes: int
    path: Path
    """Of its first file. What to open: see ``open_path``."""
    cached: CachedModel | None = None
    others: tuple[Path, ...] = ()
    """The rest of its files, in the folder of models."""

    def open_path(self) -> Path:
        """What to open. Raises DeviceError where files of the cache cannot be linked."""
        return self.path if self.cached is None else self.cached.open_path()


class ModelLibrary:
    """See the module."""

    def __init__(self, cache: HubCache, folder: Path, bundled: Path | None = None) -> None:
        self._cache = cache
        self._folder = folder
        self._bundled = bundled

    def all(self) -> Iterator[HeldModel]:
        """Every model, each once."""
        for model in self._cache.all():
            yield held_model(model)
        yield from self._own()

    def _own(self) -> Iterator[HeldModel]:
        """Those that are not in the cache."""
        yield from self._in_folder()
        if self._bundled is not None and self._bundled.is_file():
            size = self._bundled.stat().st_size
            yield HeldModel(self._bundled.stem, Where.BUNDLED, size, self._bundled)

    def cached(self, name: HubName) -> HeldModel | None:
        """A model of the hub that is here; None if it is not, or not all of it."""
        found = self._cache.find(name)
        return None if found is None else held_model(found)

    def named(self, text: str) -> HeldModel | None:
        """What a short name means: a model of the folder or the bundled one by its name, one of the
        cache by its repository's, with or without the user's and a quantisation. None if nothing.

        Raises UsageError where it means several.
        """
        if _SHORT.fullmatch(text) is None:
            return None
        wanted = text.removesuffix(".gguf").casefold()
        found = [model for model in self._own() if model.name.casefold() == wanted]
        if found:
            return found[0]
        short, _, quant = text.partition(":")
        repos = [
            repo
            for repo in self._cache.repos()
            if short.casefold() in (repo.casefold(), repo.casefold().partition("/")[2])
        ]
        cached = [self.cached(HubName(repo, quant)) for repo in repos]
        several = [model for model in cached if model is not None]
        if len(several) > 1:
            names = ", ".join(model.name for model in several)
            raise UsageError(f"{text} means several models: {names}.", hint="Name one of them.")
        return several[0] if several else None

    def remove(self, model: HeldModel) -> int:
        """Remove a model from the cache or the folder. Returns the bytes that are free again.

        Raises UsageError for the bundled one, DeviceError.
        """
        if model.cached is not None:
            return self._cache.remove(model.cached)
        if model.where is not Where.FOLDER:
            raise UsageError(f"{model.name} belongs to edgellm itself and stays.")
        with disk_errors(f"{model.name} cannot be removed", self._folder):
            freed = 0
            for path in (model.path, *model.others):
                freed += path.lstat().st_size
                path.unlink()
            folder = model.path.parent
            while folder != self._folder and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent
        return freed

    def _in_folder(self) -> Iterator[HeldModel]:
        if not self._folder.is_dir():
            return
        paths = files_below(self._folder)
        for choice in ggufs(paths):
            name = _PART.sub("", choice.files[0].removesuffix(".gguf"))
            yield self._held(name, choice)
        found = graphs(paths)
        folders = [_folder_of(choice) for choice in found]
        for choice, folder in zip(found, folders, strict=True):
            if folder and folders.count(folder) == 1:
                yield self._held(folder, choice)
            else:  # what lies beside it is of others too
                yield self._held(choice.files[0], replace(choice, files=choice.files[:1]))

    def _held(self, name: str, choice: Choice) -> HeldModel:
        paths = [self._folder / path for path in choice.files]
        if choice.onnx:
            beside = paths[0].parent.glob(f"{paths[0].name}[._]*")  # its weights
            paths += sorted(beside)
        size = sum(path.stat().st_size for path in paths)
        return HeldModel(name, Where.FOLDER, size, paths[0], others=tuple(paths[1:]))


def _folder_of(choice: Choice) -> str:
    """The folder of an ONNX model, as it is named; empty for one that has none of its own."""
    folder = choice.files[0].rpartition("/")[0]
    return folder.removesuffix("/onnx")


def held_model(model: CachedModel) -> HeldModel:
    """A model of the cache, by the name that is typed for it."""
    path = model.snapshot / model.choice.files[0]
    return HeldModel(str(model.name), Where.HUB, model.nbytes, path, cached=model)
