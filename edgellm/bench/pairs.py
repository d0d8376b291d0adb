"""Two ways to do the same, in interleaved pairs: what is measured, and what of it is reported.

A pair is one run of each, back to back, in turn first; the ratio of a pair cancels the machine's
drift. What is reported of a ratio is the median over the pairs. Runs are given as functions:
nothing here starts anything.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from edgellm.answer import Completion, GenerateOptions
from edgellm.client import LoadedModel
from edgellm.engine.childcall import ChildCaller
from edgellm.types import SamplerSettings

RUN_WITHIN_S = 600.0
DECODE_PROMPT = 32
Tell = Callable[[str], None]
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure."""

    name: str
    prompt: int
    count: int
    figure: str
    """``tpot_s`` or ``ttft_s``."""
    target: float
    """For the ratio; see ``speedup``."""
    speedup: bool
    """The ratio is yardstick / ours and should be at least the target; else it is
    ours / yardstick and should be at most that."""

    @property
    def cells(self) -> int:
        """KV cells it needs: the last token made is not fed back."""
        return self.prompt + self.count - 1

    def tokens(self, vocabulary: int) -> list[int]:
        """Its prompt: token ids at random, the same in every run."""
        generator = random.Random(1)
        return [generator.randrange(3, vocabulary) for _ in range(self.prompt)]


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each, seconds."""

    yardstick_s: float
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
            return [pair.yardstick_s / pair.ours_s for pair in self.pairs]
        return [pair.ours_s / pair.yardstick_s for pair in self.pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        if self.case.speedup:
            return self.ratio >= self.case.target
        return self.ratio <= self.case.target

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(pair, name) for pair in self.pairs))

    def to_dict(self) -> dict[str, Any]:
        names = ("yardstick_s", "ours_s", "compute_s", "other_s", "returned_bytes")
        return {
            "name": self.case.name,
            "ratio": round(self.ratio, 4),
            "ratios": [round(ratio, 4) for ratio in self.ratios],
            "target": self.case.target,
            "met": self.met,
            **{name: round(self.median(name), 6) for name in names},
        }


def fitting(cases: Sequence[Case], context_train: int, tell: Tell) -> tuple[Case, ...]:
    """The cases that a model's context is long enough for; says which are left out."""
    for case in cases:
        if case.cells > context_train:
            tell(f"{case.name} is left out: the model's context is too short for it.")
    return tuple(case for case in cases if case.cells <= context_train)


def context_for(cases: Sequence[Case]) -> int:
    """KV cells that hold any of the cases, in llama.cpp's steps of 256."""
    cells = max(case.cells for case in cases)
    return cells + -cells % 256


async def in_turn(
    number: int, first: Callable[[], Awaitable[A]], second: Callable[[], Awaitable[B]]
) -> tuple[A, B]:
    """One run of each, back to back; in every other pair the second begins."""
    if number % 2:
        b = await second()
        return await first(), b
    a = await first()
    return a, await second()


async def plain_run(yardstick: ChildCaller, prompt: Sequence[int], count: int) -> dict[str, float]:
    """One run of a loaded child of ``bench.plain``; its figures."""
    return await yardstick.call("run", RUN_WITHIN_S, prompt=list(prompt), count=count)


async def our_run(model: LoadedModel, prompt: Sequence[int], count: int) -> Completion:
    """The same over stages."""
    sampler = SamplerSettings(temperature=0.0)
    # Every run computes all of its prompt, which is the same each time.
    options = GenerateOptions(max_tokens=count, sampler=sampler, ignore_eos=True, reuse=False)
    return await model.complete(prompt, options)


async def measure_case(
    case: Case, pairs: int, yardstick: ChildCaller | LoadedModel, model: LoadedModel, tell: Tell
) -> Result:
    """Warm both up, then run the pairs. The yardstick is a child of ``bench.plain`` that has the
    model, or stages of another cluster."""
    prompt = case.tokens(model.opened.vocab)

    async def theirs(count: int = case.count) -> float:
        if isinstance(yardstick, LoadedModel):
            answer = await our_run(yardstick, prompt, count)
            return float(getattr(answer.figures, case.figure) or 0.0)
        return (await plain_run(yardstick, prompt, count))[case.figure]

    async def ours(count: int = case.count) -> Completion:
        return await our_run(model, prompt, count)

    warm = min(case.count, 4)
    await theirs(warm)
    await ours(warm)
    done: list[Pair] = []
    for number in range(pairs):
        seconds, answer = await in_turn(number, theirs, ours)
        done.append(pair_of(case, seconds, answer))
        ratio = Result(case, (done[-1],)).ratio
        tell(f"{case.name}: pair {number + 1} of {pairs}, ratio {ratio:.3f}")
    return Result(case, tuple(done))


def pair_of(case: Case, yardstick_s: float, ours: Completion) -> Pair:
    """A run of ours beside one of the yardstick."""
    figures = ours.figures
    stages = range(len(ours.plan.stages))
    returned = figures.after.returned_bytes - figures.before.returned_bytes
    per_token = returned / max(1, len(ours.tokens))
    if case.figure == "ttft_s":
        busiest = max(figures.stage(index, "prefill_s") for index in stages)
        return Pair(yardstick_s, figures.ttft_s or 0.0, busiest, per_token)
    compute = sum(figures.stage(index, "decode_s") for index in stages) / (case.count - 1)
    return Pair(yardstick_s, figures.tpot_s or 0.0, compute, per_token)
