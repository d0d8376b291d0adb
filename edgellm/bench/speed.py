"""Decode and prefill of a model in stages against the whole model, in interleaved pairs.

Each stage and the whole model have one thread, pinned where the system allows it. A pair is one
run of each, back to back, in turn first; the ratio of a pair cancels the machine's drift. What is
reported of a ratio is the median over the pairs.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from edgellm.answer import Completion, GenerateOptions, LoadOptions
from edgellm.client import Cluster, LoadedModel
from edgellm.engine.childcall import ChildCaller
from edgellm.localcluster import (
    LocalDevice,
    aside,
    local_cluster,
    local_devices,
    our_processors,
    own_node,
)
from edgellm.modelfile import read_card
from edgellm.modelref import OpenedModel
from edgellm.types import SamplerSettings

WHOLE_CHUNK = 512
LOAD_WITHIN_S = 300.0
RUN_WITHIN_S = 600.0
DECODE_PROMPT = 32
EVERYTHING_ELSE = 100 << 20
"""Bytes that a stage process may take beside its shard, KV cache and compute buffer."""
PREDICTED_WITHIN = 0.10
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure."""

    name: str
    prompt: int
    count: int
    figure: str
    """``tpot_s`` or ``ttft_s``."""
    target: float
    """For ``tpot_s`` at most this ratio (ours / whole); for ``ttft_s`` at least (whole / ours)."""

    @property
    def speedup(self) -> bool:
        return self.figure == "ttft_s"

    @property
    def cells(self) -> int:
        """KV cells it needs: the last token made is not fed back."""
        return self.prompt + self.count - 1


CASES = (
    Case("decode", DECODE_PROMPT, 64, "tpot_s", 1.10),
    Case("prefill 512", 512, 1, "ttft_s", 1.40),
    Case("prefill 2048", 2048, 1, "ttft_s", 1.70),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each, seconds."""

    whole_s: float
    ours_s: float
    compute_s: float
    """Of ours: inside ``llama_decode``; of all stages together for decode, of the busiest stage for
    prefill, where stages work at the same time."""
    returned_bytes: float

    @property
    def other_s(self) -> float:
        """Everything else: Python, pipes, the network, waiting for one another."""
        return self.ours_s - self.compute_s


@dataclass(frozen=True, slots=True)
class Result:
    case: Case
    pairs: tuple[Pair, ...]

    @property
    def ratios(self) -> list[float]:
        if self.case.speedup:
            return [pair.whole_s / pair.ours_s for pair in self.pairs]
        return [pair.ours_s / pair.whole_s for pair in self.pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return (
            self.ratio >= self.case.target
            if self.case.speedup
            else (self.ratio <= self.case.target)
        )

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(pair, name) for pair in self.pairs))

    def to_dict(self) -> dict[str, Any]:
        names = ("whole_s", "ours_s", "compute_s", "other_s", "returned_bytes")
        return {
            "name": self.case.name,
            "ratio": round(self.ratio, 4),
            "ratios": [round(ratio, 4) for ratio in self.ratios],
            "target": self.case.target,
            "met": self.met,
            **{name: round(self.median(name), 6) for name in names},
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """What one run is to measure."""

    opened: OpenedModel
    stages: int = 2
    pairs: int = 7
    chunk: int | None = None
    cases: tuple[Case, ...] = CASES


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage process."""

    device: str
    predicted: int
    """By the model card, before anything was loaded."""
    peak: int
    allowed: int
    """Shard, KV cache and compute buffer, and 100 MiB for everything else."""

    @property
    def met(self) -> bool:
        """Within what is allowed, and predicted to 10 %."""
        return self.peak <= self.allowed and abs(self.predicted / self.peak - 1) <= PREDICTED_WITHIN

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "predicted_bytes": self.predicted,
            "peak_bytes": self.peak,
            "allowed_bytes": self.allowed,
            "met": self.met,
        }


@dataclass(frozen=True, slots=True)
class Report:
    results: tuple[Result, ...]
    memory: tuple[StageMemory, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "results": [result.to_dict() for result in self.results],
            "memory": [stage.to_dict() for stage in self.memory],
        }


async def measure(bench: Bench, tell: Tell) -> Report:
    """Run the whole bench; minutes at the default counts."""
    processors = our_processors()
    context = max(case.cells for case in bench.cases)
    context += -context % 256
    whole = await ChildCaller.start("edgellm.bench.whole", name="the whole model")
    try:
        await whole.call(
            "load",
            LOAD_WITHIN_S,
            path=bench.opened.path,
            context=context,
            threads=1,
            chunk=WHOLE_CHUNK,
            pin=list(processors[:1]),
        )
        devices = local_devices(
            bench.stages,
            memory_bytes=psutil.virtual_memory().available,
            processors=processors,
            threads=1,
        )
        with aside(devices):
            return await _measure_over(bench, devices, context, whole, tell)
    finally:
        await whole.stop()


async def _measure_over(
    bench: Bench, devices: Sequence[LocalDevice], context: int, whole: ChildCaller, tell: Tell
) -> Report:
    """The first device is a node of this process, as when somebody chats; the others are not."""
    options = LoadOptions(use_all=True, context=context, chunk=bench.chunk, threads=1)
    async with (
        own_node(devices[0]) as local,
        local_cluster(devices[1:]) as nodes,
        Cluster.connect([node.address for node in nodes], local=local) as cluster,
        cluster.load(bench.opened, options) as model,
    ):
        results = [
            await _measure_case(case, bench.pairs, whole, model, tell) for case in bench.cases
        ]
        stats = await model.pipeline.stats()
        card = read_card(bench.opened.path)
        memory: list[StageMemory] = []
        if not any(case.speedup for case in bench.cases):
            return Report(tuple(results), ())  # the peak is that of a full prefill
        for stage, figures in zip(model.plan.stages, stats, strict=True):
            parts = card.stage_memory(stage.span, model.plan.settings)
            allowed = parts.weights + parts.kv + parts.compute + EVERYTHING_ELSE
            peak = int(figures["peak_bytes"])
            memory.append(StageMemory(stage.device, stage.memory_bytes, peak, allowed))
    return Report(tuple(results), tuple(memory))


async def _measure_case(
    case: Case, pairs: int, whole: ChildCaller, model: LoadedModel, tell: Tell
) -> Result:
    generator = random.Random(1)
    prompt = [generator.randrange(3, model.opened.vocab) for _ in range(case.prompt)]

    async def run_whole(count: int) -> float:
        answer = await whole.call("run", RUN_WITHIN_S, prompt=prompt, count=count)
        return float(answer[case.figure])

    async def run_ours(count: int) -> Completion:
        sampler = SamplerSettings(temperature=0.0)
        options = GenerateOptions(max_tokens=count, sampler=sampler, ignore_eos=True)
        return await model.complete(prompt, options)

    warm = min(case.count, 4)
    await run_whole(warm)
    await run_ours(warm)
    done: list[Pair] = []
    for number in range(pairs):
        if number % 2:
            ours = await run_ours(case.count)
            whole_s = await run_whole(case.count)
        else:
            whole_s = await run_whole(case.count)
            ours = await run_ours(case.count)
        done.append(_pair(case, whole_s, ours))
        ratio = Result(case, (done[-1],)).ratio
        tell(f"{case.name}: pair {number + 1} of {pairs}, ratio {ratio:.3f}")
    return Result(case, tuple(done))


def _pair(case: Case, whole_s: float, ours: Completion) -> Pair:
    figures = ours.figures
    stages = range(len(ours.plan.stages))
    returned = figures.after.returned_bytes - figures.before.returned_bytes
    per_token = returned / max(1, len(ours.tokens))
    if case.speedup:
        busiest = max(figures.stage(index, "prefill_s") for index in stages)
        return Pair(whole_s, figures.ttft_s or 0.0, busiest, per_token)
    compute = sum(figures.stage(index, "decode_s") for index in stages) / (case.count - 1)
    return Pair(whole_s, figures.tpot_s or 0.0, compute, per_token)
