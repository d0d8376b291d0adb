"""An independent runner of whole ONNX models: what the cut ones are compared with, bit for bit.

This file must not import ``edgellm``. It calls onnxruntime in the plainest way there is: the whole
graph as it is on the disk, ``session.run``, arrays that grow, one sequence, one thread, and the
optimisation level that is onnxruntime's default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class WholeOnnx:
    """A decoder with ``input_ids``, ``attention_mask``, perhaps ``position_ids``, and states whose
    inputs and outputs have names that differ in past and present only."""

    def __init__(self, path: Path, *, head: int | None = None) -> None:
        """``head``: elements of a head, where the graph does not say it."""
        ort: Any = pytest.importorskip("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = {put.name: put for put in self._session.get_inputs()}
        self._outputs = [put.name for put in self._session.get_outputs()]
        self._head = head or _head_of(path.parent)
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0
        self._states: dict[str, NDArray[Any]] = {}
        for name, put in self._inputs.items():
            if name.startswith("past"):
                dims = [self._dim(axis, dim) for axis, dim in enumerate(put.shape)]
                self._states[name] = np.zeros(dims, _TYPES[put.type])

    def _dim(self, axis: int, dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        return {0: 1, 2: 0, 3: self._head or 0}[axis]

    def decode(self, tokens: Sequence[int], *, shift: int = 0) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary]. ``shift``: wrong positions on purpose, for controls."""
        count = len(tokens)
        total = self.length + count
        feed: dict[str, Any] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None] + shift,
        }
        feed = {name: value for name, value in feed.items() if name in self._inputs}
        made = dict(zip(self._outputs, self._session.run(None, feed | self._states), strict=True))
        for name in self._states:
            self._states[name] = made[_present(name, made)]
        self.length = total
        logits: NDArray[np.float32] = made["logits"][0].astype(np.float32)
        return logits


def _present(name: str, made: dict[str, Any]) -> str:
    for past in ("past_key_values", "past"):
        output = name.replace(past, "present", 1)
        if output in made:
            return output
    raise KeyError(name)


def _head_of(folder: Path) -> int | None:
    told = folder / "genai_config.json"
    if not told.exists():
        return None
    return int(json.loads(told.read_text())["model"]["decoder"]["head_size"])
