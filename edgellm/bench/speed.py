"""Decode and prefill of a model in stages against the whole model on one thread.

Each stage and the whole model have one thread, pinned where the system allows it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil

from edgellm.answer import LoadOptions
from edgellm.bench.pairs import Case, Result, Tell, context_for, measure_case
from edgellm.client import Cluster, LoadedModel
from edgellm.engine.child import Child
from edgellm.engine.childcall import ChildCaller
from edgellm.localcluster import (
    LocalDevice,
    aside,
    local_cluster,
    local_devices,
    our_processors,
)
from edgellm.modelfile import read_card
from edgellm.modelref import OpenedModel
from edgellm.types import Plan, Weights

LOAD_WITHIN_S = 300.0
PROBED_WITHIN_S = 60.0
WHOLE_CHUNK = 512
"""Tokens of a prompt that plain llama.cpp computes at once, as it does when left alone."""
DECODE_PROMPT = 32
EVERYTHING_ELSE = 100 << 20
"""Bytes that a stage process may take beside its shard, KV cache and compute buffer."""
PREDICTED_WITHIN = 0.10

CASES = (
    Case("decode", DECODE_PROMPT, 64, "tpot_s", 1.10, speedup=False),
    Case("prefill 512", 512, 1, "ttft_s", 1.40, speedup=True),
    Case("prefill 2048", 2048, 1, "ttft_s", 1.70, speedup=True),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What one run is to measure."""

    opened: OpenedModel
    cases: tuple[Case, ...] = CASES
    devices: int = 2
    pairs: int = 7
    chunk: int | None = None
    stages: str | None = None
    """A forced split such as ``a:0-11,b:11-``; None: the planner's, with all devices."""
    weights: Weights = Weights.AUTO
    apart: bool = False
    """Whether no device is in this process: each then has a network before it."""

    @property
    def options(self) -> LoadOptions:
        """How the stages are loaded."""
        return LoadOptions(
            stages=self.stages,
            use_all=True,
            context=context_for(self.cases),
            chunk=self.chunk,
            threads=1,
            weights=self.weights,
        )


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
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [[stage.span.first, stage.span.end] for stage in self.plan.stages],
            "results": [result.to_dict() for result in self.results],
            "memory": [stage.to_dict() for stage in self.memory],
        }


async def measure(bench: Bench, tell: Tell) -> Report:
    """Run the whole bench; minutes at the default counts."""
    async with whole_model(bench, our_processors()[:1]) as whole:
        devices = bench_devices(bench)
        with aside(devices):
            async with (
                our_cluster(devices, bench.apart) as cluster,
                cluster.load(bench.opened, bench.options) as model,
            ):
                results = [
                    await measure_case(case, bench.pairs, whole, model, tell)
                    for case in bench.cases
                ]
                return Report(tuple(results), await _memory(bench, model), model.plan)


def bench_devices(bench: Bench) -> list[LocalDevice]:
    """Devices of one thread each that share this machine's memory and processors, and know how
    they compute best, as devices do that have joined."""
    devices = local_devices(
        bench.devices,
        memory_bytes=psutil.virtual_memory().available,
        processors=our_processors(),
        threads=1,
    )
    return [replace(device, probe=True) for device in devices]


@asynccontextmanager
async def our_cluster(
    devices: Sequence[LocalDevice], apart: bool = False
) -> AsyncIterator[Cluster]:
    """The first device is a node of this process, as when somebody chats, unless all are to be
    ``apart``; the others are not. Their homes are new and empty, and do not outlive them."""
    own, others = (None, devices) if apart else (devices[0], devices[1:])
    async with (
        local_cluster(others, own=own) as local,
        Cluster.connect(local.addresses, local=local.own, home=local.home) as cluster,
    ):
        await cluster.refreshed(PROBED_WITHIN_S)
        yield cluster


@asynccontextmanager
async def whole_model(bench: Bench, pin: Sequence[int]) -> AsyncIterator[ChildCaller]:
    """A process with the whole model in it, on one thread."""
    async with plain_child("the whole model") as whole:
        await load_plain(whole, bench, pin=pin)
        yield whole


@asynccontextmanager
async def plain_child(
    name: str, environment: dict[str, str] | None = None
) -> AsyncIterator[ChildCaller]:
    """A process of ``bench.plain`` without a model yet."""
    async with await Child.start(
        "edgellm.bench.plain", name=name, environment=environment
    ) as child:
        yield ChildCaller(child)


async def load_plain(
    child: ChildCaller,
    bench: Bench,
    *,
    pin: Sequence[int] = (),
    servers: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> tuple[float, int]:
    """Load the bench's model into it, or over servers.

    Gives seconds until it had made a token, and bytes that went to servers and came from them.
    """
    answer = await child.call(
        "load",
        LOAD_WITHIN_S,
        path=bench.opened.path,
        context=context_for(bench.cases),
        threads=1,
        chunk=WHOLE_CHUNK,
        pin=list(pin),
        servers=list(servers),
        ends=list(ends),
        prompt=[1],
    )
    return float(answer["load_s"]), int(answer["sent_bytes"]) + int(answer["received_bytes"])


async def _memory(bench: Bench, model: LoadedModel) -> tuple[StageMemory, ...]:
    if all(case.figure == "tpot_s" for case in bench.cases):
        return ()  # the peak is that of a full prefill
    card = read_card(bench.opened.path)
    stats = await model.pipeline.stats()
    memory: list[StageMemory] = []
    for stage, figures in zip(model.plan.stages, stats, strict=True):
        parts = card.stage_memory(stage.span, model.plan.settings)
        allowed = parts.weights + parts.kv + parts.compute + EVERYTHING_ELSE
        peak = int(figures["peak_bytes"])
        memory.append(StageMemory(stage.device, stage.memory_bytes, peak, allowed))
    return tuple(memory)
