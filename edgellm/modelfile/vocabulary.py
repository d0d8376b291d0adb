"""A model's vocabulary as a GGUF of its own: what the last of several stages needs for grammars.

Pure: it reads headers only. A file of metadata, which llama.cpp opens as it would the model, to
know how each token is spelled and which ones end an answer. It cannot make tokens of a text: merges
and scores, most of a tokenizer's bytes, are left out.
"""

from __future__ import annotations

from types import MappingProxyType

from edgellm.modelfile.ggml_types import F32, ValueType
from edgellm.modelfile.metadata import MetaValue, array_value, scalar_value
from edgellm.modelfile.model import Model
from edgellm.modelfile.recipe import ShardRecipe, ShardTensor
from edgellm.modelfile.writer import TensorLayout
from edgellm.types import LayerSpan

ROLE = "vocabulary"
_MERGES = "tokenizer.ggml.merges"
_LEFT_OUT = frozenset(
    {"tokenizer.ggml.scores", "tokenizer.huggingface.json", "tokenizer.rwkv.world"}
)


_NOTHING = ShardTensor(TensorLayout("edgellm.nothing", (8,), F32, 32), source=None)
"""A file is made of tensors: this one has the smallest there is, which nobody reads."""


def vocabulary_recipe(model: Model) -> ShardRecipe:
    """The recipe of the file of a GGUF model."""
    architecture = "general.architecture"
    kept: dict[str, MetaValue] = {architecture: model.metadata[architecture]}
    for key, value in model.metadata.items():
        if key == _MERGES:  # llama.cpp insists on the key alone
            kept[key] = array_value(ValueType.STRING, [])
        elif key.startswith("tokenizer.ggml.") and key not in _LEFT_OUT:
            kept[key] = value
    kept["edgellm.model.digest"] = scalar_value(ValueType.STRING, model.digest)
    return ShardRecipe(
        model_digest=model.digest,
        span=LayerSpan(0, model.layers),
        layers=model.layers,
        metadata=MappingProxyType(kept),
        tensors=(_NOTHING,),
    )
