"""The few native calls that edgellm makes beside plain llama.cpp ones, and safe access to them.

Only engine code in a child process imports this file: it loads the native library.
``llama()`` is llama-cpp-python's ctypes module; ``ggml()`` adds the ggml functions that it
does not bind.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from edgellm.engine.childside import import_llama_bindings, set_fields
from edgellm.errors import StageError
from edgellm.types import EngineSettings, RopeScaling

__all__ = ["KV_TYPE_IDS", "TO_FLOAT", "TypeTraits", "ggml", "llama", "rope_fields", "set_fields"]


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""``void to_float(const void * quantised, float * out, int64_t elements)``"""


def llama() -> Any:
    """llama-cpp-python's low-level module; raises StageError with the fix when it is missing."""
    return import_llama_bindings()


@functools.cache
def ggml() -> Any:
    """libggml-base with the signatures that edgellm uses."""
    bindings = llama()
    from llama_cpp import _ggml  # noqa: PLC0415 - only after the bindings are importable

    library = _load_base(_ggml.libggml_base_path) or bindings._lib
    try:
        library.ggml_get_name.restype = ctypes.c_char_p
        library.ggml_get_name.argtypes = [ctypes.c_void_p]
        library.ggml_nelements.restype = ctypes.c_int64
        library.ggml_nelements.argtypes = [ctypes.c_void_p]
        for copy in (library.ggml_backend_tensor_get, library.ggml_backend_tensor_set):
            copy.restype = None
            copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    except AttributeError as error:
        raise StageError(
            f"the installed llama.cpp library lacks a function that edgellm needs ({error}).",
            hint="Reinstall with: pip install --force-reinstall 'edgellm[llama]'",
        ) from error
    return library


def _load_base(folder: Any) -> Any:
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        path = folder / name
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


KV_TYPE_IDS = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
"""``enum ggml_type`` of the KV types in ``types.KV_TYPES``."""

_SCALING_IDS = {
    RopeScaling.MODEL: -1,
    RopeScaling.NONE: 0,
    RopeScaling.LINEAR: 1,
    RopeScaling.YARN: 2,
}
"""``enum llama_rope_scaling_type``."""


def rope_fields(settings: EngineSettings) -> dict[str, Any]:
    """What ``llama_context_params`` is told of rotary positions; 0 is the model's own."""
    # llama.cpp takes the scale as float32, and its inverse as what positions are multiplied by.
    scale = ctypes.c_float(settings.rope_scale).value
    return {
        "rope_scaling_type": _SCALING_IDS[settings.rope_scaling],
        "rope_freq_scale": 1.0 / scale if scale else 0.0,
        "rope_freq_base": settings.rope_freq_base,
    }
