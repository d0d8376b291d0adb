"""Cut a model at layer boundaries: a stage's weights are a smaller GGUF, a *shard*.

This file may import the rest of this package. ``cut`` and ``write_shard`` write one file
each, which appears complete or not at all, and with the same bytes on every machine.

A shard holds the layers of its span, renumbered from 0, with the metadata that belongs to
them. It has no tokenizer. A shard that is not the last gets a one-row embedding, so its head
costs nothing; the last one keeps the head. No shard of several holds the token embedding: the
first stage looks rows up in a file of its own (``write_embedding``). The shard of all layers is
the whole model but for its tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import ModelFileError
from edgellm.modelfile.gguf import read_header
from edgellm.modelfile.metadata import meta_integer, meta_string
from edgellm.modelfile.model import Model
from edgellm.modelfile.recipe import ShardRecipe, embedding_recipe, shard_recipe
from edgellm.modelfile.writer import padding, write_atomically
from edgellm.types import LayerSpan

__all__ = [
    "ShardFile",
    "ShardRecipe",
    "cut",
    "embedding_recipe",
    "read_shard",
    "shard_recipe",
    "write_embedding",
    "write_recipe",
    "write_shard",
]

_COPY_CHUNK = 1 << 22

ReadTensor = Callable[[str, int, int], bytes]
"""``read(tensor name, first byte, length)``: bytes of a tensor of the source model."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard on disk. ``residual_node``, ``input_node`` and ``fed_tokens``: see
    ``ArchitectureRule``."""

    path: Path
    model_digest: str
    architecture: str
    span: LayerSpan
    layers: int
    residual_node: str
    input_node: str | None
    fed_tokens: bool
    file_bytes: int

    @property
    def first(self) -> bool:
        return self.span.first == 0

    @property
    def last(self) -> bool:
        return self.span.end == self.layers


def cut(model: Model, span: LayerSpan, destination: Path) -> ShardFile:
    """Write the shard of ``span`` to ``destination`` and return it.

    Raises what ``shard_recipe`` raises, and ``DeviceError`` where the disk refuses.
    """
    return write_shard(shard_recipe(model, span), model.read, destination)


def write_shard(recipe: ShardRecipe, read: ReadTensor, destination: Path) -> ShardFile:
    """Write a shard whose tensors come from ``read``: a model on this disk, or any other source."""
    return read_shard(write_recipe(recipe, read, destination))


def write_embedding(model: Model, destination: Path) -> Path:
    """Write the file of ``embedding_recipe`` to ``destination``."""
    return write_recipe(embedding_recipe(model), model.read, destination)


def write_recipe(recipe: ShardRecipe, read: ReadTensor, destination: Path) -> Path:
    """Write any recipe's file: that of an embedding, or of an adapter's part."""
    write_atomically(destination, _chunks(recipe, read))
    return destination


def read_shard(path: Path) -> ShardFile:
    """Validate a shard's header; raises ``ModelFileError`` for a file that is not a shard."""
    header = read_header(path)
    values = [
        meta_integer(header.metadata, f"edgellm.shard.{name}")
        for name in ("first", "end", "layers")
    ]
    digest = meta_string(header.metadata, "edgellm.model.digest")
    architecture = meta_string(header.metadata, "general.architecture")
    residual = meta_string(header.metadata, "edgellm.shard.residual_node")
    first, end, layers = (-1 if value is None else value for value in values)
    if not 0 <= first < end <= layers or not digest or not architecture or not residual:
        raise ModelFileError(f"{path} is not a shard of edgellm.", field="edgellm.shard")
    return ShardFile(
        path=path,
        model_digest=digest,
        architecture=architecture,
        span=LayerSpan(first, end),
        layers=layers,
        residual_node=residual,
        input_node=meta_string(header.metadata, "edgellm.shard.input_node"),
        fed_tokens="edgellm.shard.fed_tokens" in header.metadata,
        file_bytes=header.file_size,
    )


# --- bytes ----------------------------------------------------------------------------


def _chunks(recipe: ShardRecipe, read: ReadTensor) -> Iterator[bytes]:
    """The shard's file in pieces of bounded size."""
    yield recipe.header()
    for tensor in recipe.tensors:
        nbytes = tensor.layout.nbytes
        for begin in range(0, nbytes, _COPY_CHUNK):
            length = min(_COPY_CHUNK, nbytes - begin)
            if tensor.source is None:
                yield (tensor.pattern * -(-length // len(tensor.pattern)))[:length]
                continue
            piece = read(tensor.source, begin, length)
            if len(piece) != length:
                raise ModelFileError(
                    f"tensor {tensor.source!r} came {len(piece)} bytes long, not {length}.",
                    field=tensor.source,
                )
            yield piece
        yield bytes(padding(nbytes))
