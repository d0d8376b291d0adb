"""Shards on this device's disk: cut from a model file for one stage, gone with the stage.

Blocking file work; callers run it in a thread. A shard appears under its final name only when it
is whole (``modelfile.cut`` writes aside and renames). The folder belongs to one node: what a
crash left behind is swept when the node starts again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import DeviceError, EdgeError, ModelFileError
from edgellm.modelfile.architectures import architecture_rule
from edgellm.modelfile.card import read_card
from edgellm.modelfile.cut import cut, write_embedding
from edgellm.modelfile.model import Model, open_model
from edgellm.modelfile.recipe import embedding_scale
from edgellm.types import LayerSpan


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """What a stage process loads."""

    shard: Path
    embedding: Path | None = None
    """Token embeddings; first stage of several only."""
    residual: str = ""
    input_node: str = ""
    embedding_scale: float = 1.0
    made: tuple[Path, ...] = ()
    """The files that were written for this stage, to be removed with it."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a plan says of a model, and the stage's engine and its neighbours rely on."""

    layers: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.layers} layers {self.width} wide and {self.vocab} tokens"


class ShardFolder:
    """The shards of one node, below its home."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sweep(self) -> None:
        """Remove whatever a node that died has left."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(
        self, model_path: str, digest: str, span: LayerSpan, epoch: int, shape: ModelShape
    ) -> ShardFiles:
        """The files for layers ``span`` of the model at ``model_path``.

        Raises ModelFileError when the file is invalid, is not the model with ``digest``, or is
        of another ``shape`` than the plan; DeviceError when the shard cannot be written.
        """
        model = open_model(Path(model_path))
        if model.digest != digest:
            raise ModelFileError(
                f"{model_path} is another model here than on the coordinating device.",
                hint="Copy the same file to both devices.",
            )
        card = read_card(model)
        found = ModelShape(card.n_layers, card.n_embd, card.n_vocab)
        if found != shape:
            raise ModelFileError(f"{model_path} has {found}, the plan says {shape}.")
        if len(span) == model.layers:
            # Nothing to cut; llama.cpp finds the other parts of a split file by itself.
            return ShardFiles(model.paths[0])
        return self._cut(model, span, epoch)

    def _cut(self, model: Model, span: LayerSpan, epoch: int) -> ShardFiles:
        stem = f"{model.digest[:16]}-{span.first}-{span.end}-{epoch}"
        shard_path = self._folder / f"{stem}.gguf"
        embedding_path = self._folder / f"{stem}-embedding.gguf"
        made = (shard_path, embedding_path)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            shard = cut(model, span, shard_path)
            embedding = write_embedding(model, embedding_path) if shard.first else None
        except OSError as error:
            self.remove(made)
            raise DeviceError(
                f"the shard of layers {span.first} to {span.end - 1} cannot be written:"
                f" {error.strerror}.",
                hint=f"Free some space below {self._folder}.",
            ) from error
        except EdgeError:
            self.remove(made)
            raise
        return ShardFiles(
            shard=shard.path,
            embedding=embedding,
            residual=shard.residual_node,
            input_node=shard.input_node or "",
            embedding_scale=embedding_scale(model, architecture_rule(model.architecture)),
            made=made,
        )

    @staticmethod
    def remove(files: tuple[Path, ...]) -> None:
        """Remove a stage's own files; harmless when repeated."""
        for path in files:
            path.unlink(missing_ok=True)
