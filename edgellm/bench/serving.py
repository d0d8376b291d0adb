"""Several streams at once over stages, against what the machine could do at best, and RPC.

The whole model on one thread says what a step of one, half and all of the streams takes. Two stages
with two micro-batches of half the streams each are ideal when a token of every stream takes as long
as the whole model's step of half of them. Beside it llama.cpp's own server, over RPC servers on
the same processors with the same threads. Rates are those while all streams make tokens.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edgellm.answer import DEFAULT_CHUNK, GenerateOptions, LoadOptions
from edgellm.bench.agreement import Agreement, agreement, told
from edgellm.bench.llamaserver import LlamaServer, Served, llama_server
from edgellm.bench.pairs import RUN_WITHIN_S, Case, Tell, context_for
from edgellm.bench.rpcbuild import RpcBuild
from edgellm.bench.rpcservers import rpc_servers
from edgellm.bench.speed import (
    WHOLE_CHUNK,
    Bench,
    bench_devices,
    load_plain,
    our_cluster,
    plain_child,
)
from edgellm.client import LoadedModel, explain
from edgellm.engine.childcall import ChildCaller
from edgellm.errors import EdgeError, UsageError
from edgellm.localcluster import aside, our_processors
from edgellm.planner import Situation, Workload
from edgellm.runtime.requests import MadeToken
from edgellm.scheduler.generation import prompt_chunk
from edgellm.types import Plan, SamplerSettings

STREAMS = 8
ROUNDS = 4
"""At most: each takes about a minute."""
IDEAL_TARGET = 0.85
BATCH_TARGET = 1.6
RPC_TARGET = 1.3
CASES = (Case("serving", 32, 64, "tpot_s", IDEAL_TARGET, speedup=True),)


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement of each, back to back."""

    steps_s: dict[int, float]
    """By the number of streams: seconds of the whole model's step on one thread."""
    ours: float
    """Tokens a second of all streams together."""
    rpc: float | None
    """The same of llama.cpp's server; None where there is none."""

    @property
    def half(self) -> int:
        return sorted(self.steps_s)[-2]

    @property
    def all(self) -> int:
        return max(self.steps_s)

    @property
    def ideal(self) -> float:
        """Tokens a second of two stages with two micro-batches that never wait."""
        return self.all / self.steps_s[self.half]

    @property
    def one_batch(self) -> float:
        """Tokens a second of the whole model on one thread, with all streams in a call."""
        return self.all / self.steps_s[self.all]


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is to be reached: the median over the rounds."""

    name: str
    ratios: tuple[float, ...]
    least: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.ratio >= self.least


@dataclass(frozen=True, slots=True)
class ServingReport:
    rounds: tuple[Round, ...]
    plan: Plan
    no_rpc: str
    """Why llama.cpp's server was not measured; empty where it was."""
    utilisation: tuple[float, ...]
    """Of each stage: the part of our runs that it computed."""
    agreements: tuple[Agreement, ...]
    """Of each stream's tokens with those of the same stream alone."""

    def median(self, name: str) -> float | None:
        values = [getattr(each, name) for each in self.rounds]
        return None if None in values else float(statistics.median(values))

    def step_s(self, streams: int) -> float:
        return statistics.median(each.steps_s[streams] for each in self.rounds)

    @property
    def targets(self) -> tuple[Target, ...]:
        ideal = [each.ours / each.ideal for each in self.rounds]
        batch = [each.ours / each.one_batch for each in self.rounds]
        rpc = [each.ours / each.rpc for each in self.rounds if each.rpc]
        found = [
            Target("the ideal", tuple(ideal), IDEAL_TARGET),
            Target("one batch on one thread", tuple(batch), BATCH_TARGET),
        ]
        return (*found, Target("llama-server over RPC", tuple(rpc), RPC_TARGET))[: 2 + bool(rpc)]

    def to_dict(self) -> dict[str, Any]:
        streams = sorted(self.rounds[0].steps_s)
        return {
            "layers": [[stage.span.first, stage.span.end] for stage in self.plan.stages],
            "step_s": {str(count): round(self.step_s(count), 6) for count in streams},
            "tokens_per_s": {
                name: None if value is None else round(value, 3)
                for name in ("ours", "ideal", "one_batch", "rpc")
                for value in (self.median(name),)
            },
            "targets": [
                {
                    "name": target.name,
                    "ratio": round(target.ratio, 4),
                    "ratios": [round(ratio, 4) for ratio in target.ratios],
                    "target": target.least,
                    "met": target.met,
                }
                for target in self.targets
            ],
            "stage_utilisation": [round(part, 4) for part in self.utilisation],
            "no_rpc": self.no_rpc,
            "agreement": told(self.agreements),
        }


async def measure_serving(
    bench: Bench, build: RpcBuild | str, tell: Tell, streams: int = STREAMS
) -> ServingReport:
    """Run the rounds; about a minute each. ``build`` has llama.cpp's server, or is why there is
    none. Raises UsageError where there are not two stages."""
    if bench.devices < 2:
        raise UsageError("micro-batches need two stages at least.", hint="Use --devices 2.")
    case = bench.cases[0]
    prompts = [_prompt(case, stream, bench.opened.vocab) for stream in range(streams)]
    counts = (1, streams // 2, streams)
    devices = bench_devices(bench)
    async with AsyncExitStack() as stack:
        whole = await stack.enter_async_context(plain_child("the whole model"))
        await load_plain(whole, bench, pin=our_processors()[:1])
        stack.enter_context(aside(devices))
        cluster = await stack.enter_async_context(our_cluster(devices, bench.apart))
        options = LoadOptions(
            stages=bench.stages,
            use_all=True,
            context=context_for(bench.cases),
            sequences=streams,
            chunk=bench.chunk,
            threads=1,
            weights=bench.weights,
            objective="throughput",
        )
        offers = cluster.offers(bench.opened.engine)
        plan = explain(bench.opened, offers, options, Situation(workload=_workload(case))).plan
        model = await stack.enter_async_context(cluster.load(bench.opened, options, plan=plan))
        served: LlamaServer | None = None
        no_rpc = build if isinstance(build, str) else ""
        if isinstance(build, RpcBuild):
            by_name = {device.name: device for device in devices}
            serving = [by_name[stage.device] for stage in plan.stages]
            ends = [stage.span.end for stage in plan.stages]
            servers = await stack.enter_async_context(rpc_servers(build, serving))
            try:
                served = await stack.enter_async_context(
                    llama_server(
                        build,
                        bench.opened.path,
                        servers,
                        ends=ends,
                        streams=streams,
                        context=context_for(bench.cases),
                    )
                )
            except EdgeError as error:
                no_rpc = str(error)
        run = _Run(case, prompts, counts, whole, model, served, tell)
        await run.warm()
        rounds = [await run.round(number) for number in range(min(bench.pairs, ROUNDS))]
        agreements = await run.agreements()
        return ServingReport(tuple(rounds), plan, no_rpc, run.utilisation(), agreements)


class _Run:
    """What the rounds share."""

    def __init__(
        self,
        case: Case,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        whole: ChildCaller,
        model: LoadedModel,
        served: LlamaServer | None,
        tell: Tell,
    ) -> None:
        self._case = case
        self._prompts = prompts
        self._counts = counts
        self._whole = whole
        self._model = model
        self._served = served
        self._tell = tell
        self._computed = [0.0] * len(model.plan.stages)
        self._took = 0.0
        self._made: list[tuple[int, ...]] = []
        """The tokens of the latest run of ours."""

    async def warm(self) -> None:
        """Touch all memory once."""
        await self._ours(4)
        if self._served is not None:
            await asyncio.gather(*(self._served.stream(each, 4) for each in self._prompts))

    async def round(self, number: int) -> Round:
        """Ours in the middle: what the machine is like drifts. Every other round goes backwards."""
        few, half, every = self._counts
        steps: dict[int, float] = {}
        ours, rpc = 0.0, None
        turns: list[int | str] = [few, half, "ours", every, "rpc"]
        for turn in reversed(turns) if number % 2 else turns:
            if isinstance(turn, int):
                steps[turn] = await self._step(turn)
            elif turn == "ours":
                ours = rate(await self._ours(self._case.count))
            elif self._served is not None:
                rpc = rate(await self._theirs(self._served))
        done = Round(steps, ours, rpc)
        over_rpc = "" if rpc is None else f", llama-server over RPC {rpc:.1f}"
        self._tell(
            f"round {number + 1}: {ours:.1f} tokens/s of {done.ideal:.1f} at best"
            f" ({ours / done.ideal:.3f}), one batch {done.one_batch:.1f}{over_rpc}"
        )
        return done

    async def _step(self, streams: int) -> float:
        await self._whole.call(
            "open",
            RUN_WITHIN_S,
            context=context_for((self._case,)),
            threads=1,
            chunk=WHOLE_CHUNK,
            streams=streams,
        )
        prompts = [list(prompt) for prompt in self._prompts[:streams]]
        # As many steps as the streams of the other runs have in common.
        answer = await self._whole.call(
            "streams", RUN_WITHIN_S, prompts=prompts, count=self._case.count - 1
        )
        return float(answer["step_s"])

    async def _ours(self, count: int) -> list[Served]:
        before = await self._model.pipeline.stats()
        loop = asyncio.get_running_loop()
        began = loop.time()
        made = await asyncio.gather(*(self._stream(each, count) for each in self._prompts))
        self._took += loop.time() - began
        after = await self._model.pipeline.stats()
        for at, (first, last) in enumerate(zip(before, after, strict=True)):
            self._computed[at] += last["busy_s"] - first["busy_s"]
        self._made = [tuple(token.token for token in stream) for stream in made]
        return [
            Served(tuple(token.at for token in stream), tuple(range(1, len(stream) + 1)))
            for stream in made
        ]

    async def _stream(self, prompt: Sequence[int], count: int) -> list[MadeToken]:
        pieces = self._model.stream(prompt, _greedy(count))
        return [piece.made async for piece in pieces if piece.made is not None]

    async def agreements(self) -> tuple[Agreement, ...]:
        """Run every stream alone, and see how far the latest run of all of them agrees."""
        found = []
        for prompt, made in zip(self._prompts, self._made, strict=True):
            alone = await self._model.complete(prompt, _greedy(len(made), logits=True))
            found.append(agreement(alone.tokens, alone.logits, made))
        return tuple(found)

    async def _theirs(self, served: LlamaServer) -> list[Served]:
        count = self._case.count
        return await asyncio.gather(*(served.stream(each, count) for each in self._prompts))

    def utilisation(self) -> tuple[float, ...]:
        return tuple(seconds / self._took for seconds in self._computed)


def rate(streams: Sequence[Served]) -> float:
    """Tokens a second of all streams together, from the moment when the last one began until the
    first one ended. Between two moments a stream's tokens are taken to come evenly: a server may
    hold some back until a character is whole."""
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    if end <= begin:
        raise UsageError("the streams never ran at the same time.", hint="Use more tokens.")
    made = sum(_count_at(stream, end) - _count_at(stream, begin) for stream in streams)
    return made / (end - begin)


def _count_at(stream: Served, moment: float) -> float:
    """How many tokens a stream had at a moment between its first and its last."""
    points = list(zip(stream.times, stream.counts, strict=True))
    for (before, fewer), (after, more) in pairwise(points):
        if before <= moment <= after:
            return fewer + (more - fewer) * (moment - before) / max(after - before, 1e-9)
    return float(points[-1][1])


def _greedy(count: int, *, logits: bool = False) -> GenerateOptions:
    """Without anything that an earlier run has computed."""
    sampler = SamplerSettings(temperature=0.0)
    return GenerateOptions(
        max_tokens=count, sampler=sampler, ignore_eos=True, logits=logits, reuse=False
    )


def _workload(case: Case) -> Workload:
    return Workload(case.prompt, case.count, prompt_chunk(case.prompt, DEFAULT_CHUNK))


def _prompt(case: Case, stream: int, vocabulary: int) -> list[int]:
    """Each stream its own, the same in every run."""
    tokens = case.tokens(vocabulary)
    return [3 + (token + 7919 * stream) % (vocabulary - 3) for token in tokens]
