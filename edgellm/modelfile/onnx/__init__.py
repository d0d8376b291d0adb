"""ONNX models: read safely, find their layers by structure, cut them into the stages of a pipeline.

::

    from edgellm.modelfile.onnx import OnnxCard, onnx_recipe, open_onnx
    from edgellm.types import LayerSpan

    model = open_onnx("qwen3-0.6b-onnx")  # a folder, or its .onnx file
    OnnxCard(model).boundaries
    recipe = onnx_recipe(model, LayerSpan(0, 14))  # a shard, like those of GGUF models

Errors are those of ``modelfile``: typed, with the field that is wrong. Nothing here loads native
code or weights; a device without onnxruntime can plan for one that has it.
"""

from edgellm.modelfile.onnx.card import OnnxCard
from edgellm.modelfile.onnx.config import ModelFolder, is_onnx
from edgellm.modelfile.onnx.model import ARCHITECTURE as ONNX
from edgellm.modelfile.onnx.model import OnnxModel, open_onnx
from edgellm.modelfile.onnx.shard import StageFile, onnx_recipe, open_stage

__all__ = [
    "ONNX",
    "ModelFolder",
    "OnnxCard",
    "OnnxModel",
    "StageFile",
    "is_onnx",
    "onnx_recipe",
    "open_onnx",
    "open_stage",
]
