"""Model files: read GGUFs safely, describe a model, cut it into the shards of a pipeline.

A model is opened by its file, or by any part of a split one, and described by its card::

    from edgellm.modelfile import open_model, read_card

    model = open_model("tinyllama-q4_k_m.gguf")
    card = read_card(model)
    card.n_layers, card.boundaries, card.kv_bytes_per_token("q8_0")

It is cut at layer boundaries with ``edgellm.modelfile.cut``: each stage of a pipeline runs its
span of layers from a *shard*, a GGUF that unpatched llama.cpp loads, and the first of several
stages looks its tokens up in a small file of embeddings::

    from pathlib import Path
    from edgellm.modelfile import open_model
    from edgellm.modelfile.cut import cut, write_embedding
    from edgellm.types import LayerSpan

    model = open_model("tinyllama-q4_k_m.gguf")
    write_embedding(model, Path("embedding.gguf"))
    first = cut(model, LayerSpan(0, 11), Path("first.gguf"))
    last = cut(model, LayerSpan(11, 22), Path("last.gguf"))

Where the tensors are not all on one disk, ``shard_recipe`` says what a shard is made of, and
``write_shard`` puts it together from any source of bytes.

Errors: ``UsageError`` for a missing file, ``ModelFileError`` (with ``field``) for an invalid
one, ``UnsupportedModelError`` for one that cannot be run or cut, ``SplitError`` for a span that
may not be a stage. Everything is validated before native code sees a file.

This package may import ``errors``, ``types`` and ``settings`` of edgellm, and no third party.
"""

from edgellm.modelfile.architectures import ArchitectureRule, Support, architecture_rule
from edgellm.modelfile.card import LayerCard, MemoryEstimate, ModelCard, read_card
from edgellm.modelfile.cut import ShardFile, read_shard, write_embedding, write_shard
from edgellm.modelfile.gguf import GgufHeader, TensorInfo, read_header
from edgellm.modelfile.layers import legal_boundaries, span_problem
from edgellm.modelfile.metadata import MetaValue
from edgellm.modelfile.model import Model, TensorSource, open_model
from edgellm.modelfile.recipe import ShardRecipe, ShardTensor, embedding_recipe, shard_recipe

__all__ = [
    "ArchitectureRule",
    "GgufHeader",
    "LayerCard",
    "MemoryEstimate",
    "MetaValue",
    "Model",
    "ModelCard",
    "ShardFile",
    "ShardRecipe",
    "ShardTensor",
    "Support",
    "TensorInfo",
    "TensorSource",
    "architecture_rule",
    "embedding_recipe",
    "legal_boundaries",
    "open_model",
    "read_card",
    "read_header",
    "read_shard",
    "shard_recipe",
    "span_problem",
    "write_embedding",
    "write_shard",
]
