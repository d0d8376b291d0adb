"""What a coordinator shares with the devices of its plans: manifests, and the model's tensors.

It is the trust anchor of a load: only its word says what a stage is made of. Everything is
addressed by digest; what is not part of a plan that is loading or loaded here is not given.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgellm.modelfile.manifest import ShardManifest, shard_manifest
from edgellm.modelfile.model import Model
from edgellm.modelfile.onnx import OnnxModel, onnx_recipe
from edgellm.modelfile.recipe import ShardRecipe, embedding_recipe, shard_recipe
from edgellm.store.digests import TensorDigests
from edgellm.store.disk import Progress
from edgellm.store.sources import ModelTensors
from edgellm.types import LayerSpan
from edgellm.wire.messages import FileWanted

StageFileList = tuple[FileWanted, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What one plan shares."""

    files: tuple[StageFileList, ...]
    """Of each stage, in the plan's order."""
    manifests: dict[str, bytes]
    """Encoded, by digest."""
    tensors: ModelTensors


class Shares:
    """A ``TensorServer`` of everything that is shared at the moment."""

    def __init__(self) -> None:
        self._shares: dict[int, Share] = {}

    def add(self, epoch: int, share: Share) -> None:
        self._shares[epoch] = share

    def drop(self, epoch: int) -> None:
        self._shares.pop(epoch, None)

    def holds(self, digests: Iterable[str]) -> list[bool]:
        wanted = list(digests)
        found = [False] * len(wanted)
        for share in list(self._shares.values()):
            for at, held in enumerate(share.tensors.holds(wanted)):
                found[at] = found[at] or held or wanted[at] in share.manifests
        return found

    def read(self, digest: str, offset: int, length: int) -> bytes | None:
        for share in list(self._shares.values()):
            raw = share.manifests.get(digest)
            data = (
                raw[offset : offset + length] if raw else share.tensors.read(digest, offset, length)
            )
            if data:
                return data
        return None


async def share_model(
    model: Model,
    spans: Sequence[LayerSpan],
    digests: TensorDigests,
    progress: Progress | None = None,
) -> Share:
    """Hash what ``spans`` need of ``model`` (or look it up) and make their manifests.

    Raises ModelFileError, UnsupportedModelError, SplitError, and DeviceError where it is stopped.
    """
    cancel = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(_share, model, spans, digests, progress, cancel))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        cancel.set()  # a thread cannot be cancelled, only asked
        await asyncio.gather(work, return_exceptions=True)
        raise


def _share(
    model: Model,
    spans: Sequence[LayerSpan],
    digests: TensorDigests,
    progress: Progress | None,
    cancel: threading.Event,
) -> Share:
    recipes = [_recipes(model, span) for span in spans]
    needed = {name for stage in recipes for recipe in stage.values() for name in recipe.sources}
    found = digests.of(model, sorted(needed), progress=progress, cancel=cancel)
    manifests: dict[str, bytes] = {}
    files = []
    for stage in recipes:
        wanted = []
        for role, recipe in stage.items():
            manifest: ShardManifest = shard_manifest(recipe, found)
            raw = manifest.encode()
            manifests[manifest.digest] = raw
            wanted.append(FileWanted(role, manifest.digest, len(raw)))
        files.append(tuple(wanted))
    return Share(tuple(files), manifests, ModelTensors(model, found))


def _recipes(model: Model, span: LayerSpan) -> dict[str, ShardRecipe]:
    """By role: what a stage loads."""
    if isinstance(model, OnnxModel):
        return {"shard": onnx_recipe(model, span)}
    recipes = {"shard": shard_recipe(model, span)}
    if span.first == 0 and len(span) < model.layers:
        recipes["embedding"] = embedding_recipe(model)
    return recipes
