"""The process that loads the engine for ``doctor``. Run as ``python -m edgellm.cli.enginechild``.

It calls the library once: a build for another processor crashes here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.engine.childmessages import Answer, answer_calls
from edgellm.engine.childside import import_llama_bindings, open_channel


def load(_request: Mapping[str, Any]) -> Answer:
    """Which features of the processor the engine uses."""
    bindings = import_llama_bindings()
    bindings.llama_backend_init()
    told = bindings.llama_print_system_info().decode("utf-8", "replace")
    used = [part.strip() for part in told.replace(":", "|").split("|")]
    return {"features": " ".join(part.removesuffix(" = 1") for part in used if "= 1" in part)}


def main() -> None:
    answer_calls(open_channel(), {"load": load})


if __name__ == "__main__":
    main()
