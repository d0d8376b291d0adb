"""A model over llama.cpp's own RPC servers beside the same model in our stages, in one run.

The same two processors serve both: an RPC server and a stage each, one thread, pinned. The layers
are cut at the same place. The RPC client computes no layer. It is measured as it is by default, and
its prefill again with the chunks that suit it best.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgellm.bench.pairs import (
    RUN_WITHIN_S,
    Case,
    Result,
    Tell,
    context_for,
    in_turn,
    measure_case,
    our_run,
    plain_run,
)
from edgellm.bench.rpcbuild import RpcBuild
from edgellm.bench.rpcservers import rpc_servers
from edgellm.bench.speed import (
    DECODE_PROMPT,
    WHOLE_CHUNK,
    Bench,
    bench_devices,
    load_plain,
    our_cluster,
    plain_child,
)
from edgellm.client import Cluster, LoadedModel, plan_over
from edgellm.engine.childcall import ChildCaller
from edgellm.figures import Figures
from edgellm.localcluster import LocalDevice, aside
from edgellm.types import Plan

CASES = (
    Case("decode", DECODE_PROMPT, 64, "tpot_s", 1.25, speedup=True),
    Case("prefill 512", 512, 1, "ttft_s", 1.10, speedup=True),
)
LOADS = 3
"""Times that a load is repeated, at most."""
LOAD_TARGET = 5.0
RPC_CHUNKS = (64, 128, 256, WHOLE_CHUNK)
"""Chunks of a prompt that the RPC client is tried with (llama.cpp's ``-ub``)."""
CHUNK_TRIES = 3
SYSTEM_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """One load: from asking for the model to its first token. The model's file was in memory, and
    all processes ran before but those that we start for stages."""

    seconds: float
    moved_bytes: int
    """Between the asking process and the others; for RPC 0 where the system does not count."""


@dataclass(frozen=True, slots=True)
class Loads:
    """Loads of the same model, one after the other, by the same processes."""

    rpc_first: Load
    rpc_again: tuple[Load, ...]
    """Servers as they are by default: every load brings all weights."""
    rpc_cached: tuple[Load, ...]
    """Servers that keep large tensors on disk (``--cache``) and have them already."""
    ours_first: Load
    """Devices that have nothing."""
    ours_again: tuple[Load, ...]

    @property
    def ratio(self) -> float:
        return median_load(self.rpc_again) / median_load(self.ours_again)

    @property
    def met(self) -> bool:
        return self.ratio >= LOAD_TARGET

    def to_dict(self) -> dict[str, Any]:
        series = {
            "rpc_first": (self.rpc_first,),
            "rpc_again": self.rpc_again,
            "rpc_cached": self.rpc_cached,
            "ours_first": (self.ours_first,),
            "ours_again": self.ours_again,
        }
        return {
            **{f"{name}_s": [round(load.seconds, 4) for load in s] for name, s in series.items()},
            **{f"{name}_bytes": s[-1].moved_bytes for name, s in series.items()},
            "ratio": round(self.ratio, 4),
            "target": LOAD_TARGET,
            "met": self.met,
        }


def median_load(loads: Sequence[Load]) -> float:
    """Seconds."""
    return statistics.median(load.seconds for load in loads)


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes that cross between processes for one token of decode, both directions of all links."""

    rpc: float | None
    """None where the system does not count them."""
    ours: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "rpc": None if self.rpc is None else round(self.rpc, 1),
            "ours": round(self.ours, 1),
        }


@dataclass(frozen=True, slots=True)
class RpcReport:
    results: tuple[Result, ...]
    loads: Loads
    token_bytes: TokenBytes
    best_chunk: int
    """Of prompts, for the RPC client; what is measured with it says so in its name."""
    plan: Plan
    same_kernels: bool
    """Both llama.cpp builds say the same of the processor's instructions."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "results": [result.to_dict() for result in self.results],
            "loads": self.loads.to_dict(),
            "bytes_per_token": self.token_bytes.to_dict(),
            "rpc_best_chunk": self.best_chunk,
            "layers": [[stage.span.first, stage.span.end] for stage in self.plan.stages],
            "same_kernels": self.same_kernels,
        }


async def measure_rpc(bench: Bench, build: RpcBuild, tell: Tell) -> RpcReport:
    """Run the whole comparison; minutes at the default counts."""
    devices = bench_devices(bench)
    with aside(devices):
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(our_cluster(devices, bench.apart))
            run = _Run(bench, build, cluster, tell)
            same = await run.same_kernels()
            by_name = {device.name: device for device in devices}
            serving = [by_name[stage.device] for stage in run.plan().stages]
            servers = await stack.enter_async_context(rpc_servers(build, serving))
            loads = await run.loads(serving, servers)
            rpc = await stack.enter_async_context(plain_child("the RPC client", build.environment))
            await run.load_rpc(rpc, servers)
            model = await stack.enter_async_context(run.load_ours())
            results = [
                await measure_case(case, bench.pairs, rpc, model, tell) for case in bench.cases
            ]
            token_bytes = await _token_bytes(rpc, model)
            chunk, tuned = await run.tuned(rpc, model)
            return RpcReport((*results, *tuned), loads, token_bytes, chunk, model.plan, same)


class _Run:
    """One comparison under way: what its steps share."""

    def __init__(self, bench: Bench, build: RpcBuild, cluster: Cluster, tell: Tell) -> None:
        self._bench = bench
        self._build = build
        self._cluster = cluster
        self._tell = tell

    def plan(self) -> Plan:
        """Ours, of an epoch of its own at every call."""
        opened = self._bench.opened
        return plan_over(opened, self._cluster.offers(opened.engine), self._bench.options)

    def load_ours(self) -> AbstractAsyncContextManager[LoadedModel]:
        return self._cluster.load(self._bench.opened, plan=self.plan())

    async def load_rpc(self, rpc: ChildCaller, servers: Sequence[str]) -> Load:
        """Cut at the same layers as ours."""
        ends = [stage.span.end for stage in self.plan().stages]
        return Load(*await load_plain(rpc, self._bench, servers=servers, ends=ends))

    async def same_kernels(self) -> bool:
        said = []
        for environment in ({}, self._build.environment):
            async with plain_child("llama.cpp", environment) as child:
                said.append(await child.call("system", SYSTEM_WITHIN_S))
        return bool(said[0]["system"] == said[1]["system"])

    async def loads(self, devices: Sequence[LocalDevice], servers: Sequence[str]) -> Loads:
        """Time the loads; nothing stays loaded."""

        async def theirs(servers: Sequence[str] = servers) -> Load:
            async with plain_child("the RPC client", self._build.environment) as rpc:
                return await self.load_rpc(rpc, servers)

        first = await in_turn(0, theirs, self._our_load)
        self._tell(f"first load: RPC {first[0].seconds:.2f} s, ours {first[1].seconds:.2f} s")
        again: list[tuple[Load, Load]] = []
        for number in range(min(self._bench.pairs, LOADS)):
            again.append(await in_turn(number, theirs, self._our_load))
            rpc, ours = (load.seconds for load in again[-1])
            self._tell(f"load again: RPC {rpc:.2f} s, ours {ours:.2f} s")
        with tempfile.TemporaryDirectory(prefix="edgellm-rpc-") as cache:
            async with rpc_servers(self._build, devices, Path(cache)) as keeping:
                filling = await theirs(keeping)
                cached = [await theirs(keeping) for _ in again]
        self._tell(f"RPC with a cache: {filling.seconds:.2f} s, then {cached[-1].seconds:.2f} s")
        return Loads(
            rpc_first=first[0],
            rpc_again=tuple(rpc for rpc, _ in again),
            rpc_cached=tuple(cached),
            ours_first=first[1],
            ours_again=tuple(ours for _, ours in again),
        )

    async def _our_load(self) -> Load:
        before, began = self._session_bytes(), time.perf_counter()
        async with self.load_ours() as model:
            await our_run(model, [1], 1)
            return Load(time.perf_counter() - began, self._session_bytes() - before)

    def _session_bytes(self) -> int:
        traffic = [peer.session.traffic for peer in self._cluster.devices()]
        return sum(each.sent_bytes + each.received_bytes for each in traffic)

    async def tuned(self, rpc: ChildCaller, model: LoadedModel) -> tuple[int, list[Result]]:
        """The chunk that the RPC client's prefill is fastest with, and prefill with that, unless it
        is the default, which is measured already."""
        prefills = [case for case in self._bench.cases if case.figure == "ttft_s"]
        if not prefills:
            return WHOLE_CHUNK, []
        chunk = await self._best_chunk(rpc, prefills[0].tokens(model.opened.vocab))
        if chunk == WHOLE_CHUNK:
            return chunk, []
        await self._open(rpc, chunk)
        cases = [replace(case, name=f"RPC at -ub {chunk}") for case in prefills]
        pairs = self._bench.pairs
        return chunk, [await measure_case(case, pairs, rpc, model, self._tell) for case in cases]

    async def _best_chunk(self, rpc: ChildCaller, prompt: Sequence[int]) -> int:
        """By the shortest of several tries, which a busy machine disturbs least."""
        seconds = dict.fromkeys(RPC_CHUNKS, math.inf)
        for _ in range(CHUNK_TRIES):
            for chunk in RPC_CHUNKS:
                await self._open(rpc, chunk)
                took = (await plain_run(rpc, prompt, 1))["ttft_s"]
                seconds[chunk] = min(seconds[chunk], took)
        for chunk, took in seconds.items():
            self._tell(f"RPC in chunks of {chunk}: {len(prompt)} tokens in {took:.2f} s at best")
        return min(RPC_CHUNKS, key=lambda chunk: seconds[chunk])

    async def _open(self, rpc: ChildCaller, chunk: int) -> None:
        context = context_for(self._bench.cases)
        await rpc.call("open", RUN_WITHIN_S, context=context, threads=1, chunk=chunk)


async def _token_bytes(rpc: ChildCaller, model: LoadedModel) -> TokenBytes:
    """Of decode: what further tokens add, so that prompt, opening and statistics are left out."""
    case = CASES[0]
    prompt = case.tokens(model.opened.vocab)
    theirs = await plain_run(rpc, prompt, case.count)
    counted = theirs["sent_bytes"] + theirs["received_bytes"]
    one, many = [(await our_run(model, prompt, count)).figures for count in (1, case.count)]
    return TokenBytes(counted or None, (_moved(many) - _moved(one)) / (case.count - 1))


def _moved(figures: Figures) -> int:
    return sum(int(link["bytes"]) for link in figures.wire()["links"])
