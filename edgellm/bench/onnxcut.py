"""What cutting an ONNX model costs by itself: two sessions against one, in one process.

Interleaved runs of three runners (see ``onnxrunners``): the whole graph in a plain onnxruntime
session, the whole graph in our engine, and our engine with the graph in two parts. All three must
say the same tokens, or nothing was measured.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.bench.pairs import RUN_WITHIN_S, Tell
from edgellm.engine.childcall import ChildCaller
from edgellm.errors import DeviceError, UsageError
from edgellm.localcluster import our_processors
from edgellm.modelfile.onnx import open_onnx

TARGET = 1.05
LEAST_STEP_S = 0.010
STEPS = 32
LOADS = 3
"""Where the system puts the weights in memory moves any of them by some percent: each load anew."""
LOAD_WITHIN_S = 300.0
RUNNERS = ("plain", "whole", "cut")


@dataclass(frozen=True, slots=True)
class OnnxCutReport:
    """Seconds of processor time a step, by runner, in the order of the runs."""

    layers: tuple[int, ...]
    """Where each part ends."""
    steps_s: Mapping[str, tuple[float, ...]]

    def ratios(self, yardstick: str) -> list[float]:
        """The cut's time over another's, run by run."""
        return [a / b for a, b in zip(self.steps_s["cut"], self.steps_s[yardstick], strict=True)]

    def ratio(self, yardstick: str) -> float:
        return statistics.median(self.ratios(yardstick))

    @property
    def met(self) -> bool:
        """At a shape where a step takes long enough for the question to matter."""
        step = min(statistics.median(self.steps_s[name]) for name in ("plain", "whole"))
        within = all(self.ratio(name) <= TARGET for name in ("plain", "whole"))
        return within and step >= LEAST_STEP_S

    def to_dict(self) -> dict[str, Any]:
        return {
            "ends": list(self.layers),
            "step_s": {
                name: round(statistics.median(steps), 6) for name, steps in self.steps_s.items()
            },
            "ratios": {
                name: [round(ratio, 4) for ratio in self.ratios(name)]
                for name in ("plain", "whole")
            },
            "ratio": {name: round(self.ratio(name), 4) for name in ("plain", "whole")},
            "target": TARGET,
            "met": self.met,
        }


async def measure_onnx_cut(
    path: Path, pairs: int, tell: Tell, *, loads: int = LOADS
) -> OnnxCutReport:
    """Run the whole bench on the model at ``path``. Raises UsageError where it cannot be cut."""
    model = open_onnx(path)
    if not model.cuts:
        raise UsageError(f"{path} cannot be cut: there is nothing to measure.")
    middle = min(model.cuts, key=lambda cut: abs(cut - model.layers / 2))
    ends = (middle, model.layers)
    found: dict[str, list[float]] = {name: [] for name in RUNNERS}
    for number in range(loads):
        with tempfile.TemporaryDirectory(prefix="edgellm-") as folder:
            child = await ChildCaller.start("edgellm.bench.onnxrunners", name="onnxruntime")
            try:
                await child.call(
                    "load",
                    LOAD_WITHIN_S,
                    path=str(path),
                    ends=list(ends),
                    folder=folder,
                    pin=list(our_processors()[:1]),
                )
                await _runs(child, pairs, found)
            finally:
                await child.stop()
        ratio = _report(ends, found).ratio("whole")
        tell(f"onnx: load {number + 1} of {loads}, ratio {ratio:.3f}")
    return _report(ends, found)


def _report(ends: tuple[int, ...], found: dict[str, list[float]]) -> OnnxCutReport:
    return OnnxCutReport(ends, {name: tuple(steps) for name, steps in found.items()})


async def _runs(child: ChildCaller, pairs: int, found: dict[str, list[float]]) -> None:
    said: set[tuple[int, ...]] = set()
    for name in RUNNERS:
        await child.call("run", RUN_WITHIN_S, name=name, steps=4)  # warm
    for number in range(pairs):
        at = number % len(RUNNERS)  # each begins in turn
        for name in (*RUNNERS[at:], *RUNNERS[:at]):
            made = await child.call("run", RUN_WITHIN_S, name=name, steps=STEPS)
            found[name].append(made["step_s"])
            said.add(tuple(made["tokens"]))
        if len(said) > 1:
            raise DeviceError("the cut model says other tokens than the whole one.")
