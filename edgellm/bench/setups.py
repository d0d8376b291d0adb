"""Does the planner tell the truth? Real pipelines in various set-ups, predicted and measured.

Devices are real nodes on this machine: slower ones have a part of a processor's time
(``throttle``), slow links are cables of that speed (``cables``). The one that asks is a device of
its own, with a node in this process and no memory for stages. Devices measure themselves and their
links, and the planner predicts, exactly as when somebody runs ``edgellm plan``; then the plan is
loaded and run.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgellm.answer import Completion, LoadOptions
from edgellm.bench.cables import Cables
from edgellm.bench.pairs import our_run
from edgellm.bench.place import enter_network
from edgellm.bench.throttle import Throttles, throttles
from edgellm.client import Cluster, LoadedModel
from edgellm.errors import DeviceError
from edgellm.localcluster import LocalDevice, local_cluster, our_processors
from edgellm.modelref import OpenedModel
from edgellm.planner import Explained, Workload, parse_objective, replanned
from edgellm.scheduler.generation import chunk_spans, prompt_chunk
from edgellm.settings import LOOPBACK

Tell = Callable[[str], None]

PROMPT, ANSWER = 256, 33
RUNS = 3
WITHIN = 0.15
"""Of time to first token and time per output token, each."""
MEMORY_WITHIN = 0.10
_ASKER = "desk"
_ASKER_MEMORY = 1 << 20
_PROBED_WITHIN_S = 180.0
_MIB = 1 << 20
_MOST_DEVICES = 3


@dataclass(frozen=True, slots=True)
class Machine:
    """One device of a set-up."""

    name: str
    share: float = 1.0
    """Of one processor's time."""
    memory: int = 1024
    """Mebibytes that it offers."""
    rate: str | None = None
    """Of its cable, for what it sends; None: as fast as this machine is."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One set-up: what there is, and what is asked of it."""

    name: str
    about: str
    machines: tuple[Machine, ...]
    stages: str | None = None
    """A forced split; None: the planner's."""
    objective: str = "latency"
    prompt: int = PROMPT
    pinned: bool = False
    """Whether each device has a processor for itself, where there are enough: as in ``demo``."""
    against_solo: bool = False
    """Whether the best device alone is measured as well: which of the two is faster is to be
    predicted."""


def _thirds(*shares: float, rate: str | None = None) -> tuple[Machine, ...]:
    """Three devices, none of which can hold half of the model."""
    return tuple(Machine(name, share, 400, rate) for name, share in zip("abc", shares, strict=True))


SETUPS = (
    Setup("solo", "one device", (Machine("a"),)),
    Setup(
        "halves",
        "two alike that must share",
        (Machine("a", 1, 480), Machine("b", 1, 480)),
        pinned=True,
    ),
    Setup(
        "uneven",
        "two, one of them less than half as fast; neither can hold the model",
        (Machine("a", 0.9, 480), Machine("b", 0.4, 480)),
    ),
    Setup(
        "prompt",
        "two, planned for the first token, a prompt of 1024",
        (Machine("a"), Machine("b", 0.6)),
        objective="ttft",
        prompt=1024,
    ),
    Setup(
        "backwards",
        "a bad split that was asked for: most layers on the slow one",
        (Machine("a", 0.9), Machine("b", 0.4)),
        stages="b:0-15,a:15-",
        against_solo=True,
    ),
    Setup("thirds", "three alike, all of them needed", _thirds(0.6, 0.6, 0.6)),
    Setup("ladder", "three of three speeds", _thirds(0.8, 0.6, 0.4)),
    Setup(
        "cable",
        "two over 100 Mbit/s",
        (Machine("a", 1, 480, "100mbit"), Machine("b", 1, 480, "100mbit")),
        pinned=True,
    ),
    Setup(
        "slow cable",
        "two over 8 Mbit/s, where splitting loses",
        (Machine("a", 1, 1024, "8mbit"), Machine("b", 1, 1024, "8mbit")),
        stages="a:0-11,b:11-",
        against_solo=True,
    ),
    Setup("slow thirds", "three over 30 Mbit/s", _thirds(0.6, 0.6, 0.4, rate="30mbit")),
)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    ttft_s: float
    tpot_s: float

    def to_dict(self) -> dict[str, float]:
        return {"ttft_s": round(self.ttft_s, 6), "tpot_s": round(self.tpot_s, 6)}


@dataclass(frozen=True, slots=True)
class StagePair:
    """One stage of a set-up, predicted and measured."""

    device: str
    layers: tuple[int, int]
    decode_s: tuple[float, float]
    """One token: of the prediction the whole step, of the measurement what the engine computed."""
    chunk_s: tuple[float, float]
    """The same of a chunk of the prompt."""
    beside_s: float
    """Measured, a token: what the stage process did beside the engine's own work."""
    memory: tuple[int, int]
    """Peak bytes."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "layers": list(self.layers),
            "decode_s": [round(one, 6) for one in self.decode_s],
            "chunk_s": [round(one, 6) for one in self.chunk_s],
            "beside_s": round(self.beside_s, 6),
            "memory_bytes": list(self.memory),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a set-up."""

    setup: Setup
    predicted: Times
    measured: Times
    stages: tuple[StagePair, ...]
    alone: tuple[Times, Times] | None = None
    """The best device alone, predicted and measured, where that was asked for."""
    why: str = ""

    @property
    def errors(self) -> tuple[float, float]:
        """Of TTFT and of TPOT: 0.1 is predicted a tenth too long."""
        told, was = self.predicted, self.measured
        return told.ttft_s / was.ttft_s - 1, told.tpot_s / was.tpot_s - 1

    @property
    def memory_error(self) -> float:
        """The largest of any stage."""
        return max((told / was - 1 for told, was in (s.memory for s in self.stages)), key=abs)

    @property
    def choice_right(self) -> bool:
        """Whether it was predicted which is faster: these stages, or one device alone."""
        if self.alone is None:
            return True
        work = _workload(self.setup)
        told, was = (
            _request_s(alone, work) < _request_s(split, work)
            for alone, split in zip(self.alone, (self.predicted, self.measured), strict=True)
        )
        return told is was

    @property
    def met(self) -> bool:
        return max(map(abs, self.errors)) <= WITHIN and self.choice_right

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.setup.name,
            "about": self.setup.about,
            "predicted": self.predicted.to_dict(),
            "measured": self.measured.to_dict(),
            "errors": [round(error, 4) for error in self.errors],
            "memory_error": round(self.memory_error, 4),
            "stages": [stage.to_dict() for stage in self.stages],
            "alone": None if self.alone is None else [one.to_dict() for one in self.alone],
            "choice_right": self.choice_right,
            "met": self.met,
        }


@dataclass(slots=True)
class _Place:
    """Where devices are put."""

    throttles: Throttles | None
    cables: Cables | None
    figures: Path
    """Their home for figures: measured in this run, not on some other day."""
    problems: list[str] = field(default_factory=list)

    def missing(self, setup: Setup) -> str:
        """Why a set-up cannot be had here; empty where it can."""
        if any(each.share < 1 for each in setup.machines) and self.throttles is None:
            return self.problems[0]
        if any(each.rate for each in setup.machines) and self.cables is None:
            return self.problems[-1]
        return ""

    def device(self, number: int, setup: Setup) -> LocalDevice:
        """``number`` from 1."""
        machine = setup.machines[number - 1]
        processors = our_processors()
        enough = setup.pinned and len(processors) >= len(setup.machines)
        group = namespace = ""
        if self.throttles is not None and machine.share < 1:
            group = str(self.throttles.group(machine.name, machine.share))
        listen = LOOPBACK
        if self.cables is not None:
            namespace, listen = self.cables.namespace(number), self.cables.address(number)
            self.cables.shape(number, machine.rate)
        return LocalDevice(
            name=machine.name,
            memory_bytes=machine.memory * _MIB,
            pin=processors[number - 1 : number] if enough else (),
            probe=True,
            listen=listen,
            behind=(
                *("env", f"XDG_DATA_HOME={self.figures}"),
                *(sys.executable, "-m", "edgellm.bench.place", namespace, group),
            ),
        )

    def asker(self) -> LocalDevice:
        listen = self.cables.address(_MOST_DEVICES + 1) if self.cables else LOOPBACK
        return LocalDevice(name=_ASKER, memory_bytes=_ASKER_MEMORY, listen=listen)


@contextlib.contextmanager
def _place(tell: Tell) -> Iterator[_Place]:
    """All that this system allows. This process moves into the network for good."""
    with contextlib.ExitStack() as stack:
        figures = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgellm-figures-"))
        place = _Place(None, None, Path(figures))
        try:
            place.throttles = stack.enter_context(throttles())
        except DeviceError as error:
            place.problems.append(error.message)
            tell(f"No slower devices: {error.message}")
        try:
            place.cables = Cables(_MOST_DEVICES + 1)
            stack.callback(place.cables.remove)
            enter_network(place.cables.namespace(_MOST_DEVICES + 1))
        except (DeviceError, OSError) as error:
            place.cables = None
            place.problems.append(str(error))
            tell(f"No slower links: {error}")
        yield place


async def measure_setups(opened: OpenedModel, setups: Sequence[Setup], tell: Tell) -> list[Outcome]:
    """Run them, one after the other. Those that this system cannot have are told of and left out.

    To be called from the main thread, before others are started.
    """
    outcomes = []
    with _place(tell) as place:
        for setup in setups:
            missing = place.missing(setup)
            if missing:
                tell(f"{setup.name} is left out: {missing}")
                continue
            began = time.monotonic()
            outcomes.append(await _outcome(opened, setup, place))
            tell(f"{setup.name}: {time.monotonic() - began:.0f} s")
    return outcomes


async def _outcome(opened: OpenedModel, setup: Setup, place: _Place) -> Outcome:
    async with _cluster(setup, place) as cluster:
        explained = await _planned(cluster, opened, setup)
        told = explained.prediction
        async with _loaded(cluster, opened, setup, explained) as model:
            measured, last = await _measured(model, setup)
            stats = await model.pipeline.stats()
        stages = tuple(
            StagePair(
                device=stage.device,
                layers=(stage.span.first, stage.span.end),
                decode_s=(stage.decode_s, last.figures.stage(at, "decode_s") / (ANSWER - 1)),
                chunk_s=(stage.chunk_s, last.figures.stage(at, "prefill_s") / told.workload.chunks),
                beside_s=_beside_s(last, at),
                memory=(stage.memory_bytes, int(figures["peak_bytes"])),
            )
            for at, (stage, figures) in enumerate(zip(told.stages, stats, strict=True))
        )
        alone = None
        if setup.against_solo and explained.solo is not None:
            one = replace(setup, stages=f"{explained.solo.device}:0-")
            single = await _planned(cluster, opened, one)
            async with _loaded(cluster, opened, one, single) as model:
                its, _ = await _measured(model, one)
            alone = Times(single.prediction.ttft_s, single.prediction.tpot_s), its
        predicted = Times(told.ttft_s, told.tpot_s)
        return Outcome(setup, predicted, measured, stages, alone, explained.plan.why)


def _beside_s(answer: Completion, stage: int) -> float:
    figures = answer.figures
    steps = ANSWER - 1 + len(chunk_spans(figures.prompt_tokens, figures.prompt_chunk))
    return (figures.stage(stage, "busy_s") - figures.compute(stage)) / steps


@contextlib.asynccontextmanager
async def _cluster(setup: Setup, place: _Place) -> AsyncIterator[Cluster]:
    devices = [place.device(at, setup) for at in range(1, len(setup.machines) + 1)]
    async with (
        local_cluster(devices, own=place.asker()) as local,
        Cluster.connect(local.addresses, local=local.own, home=local.home) as cluster,
    ):
        await cluster.refreshed(_PROBED_WITHIN_S)
        yield cluster


async def _planned(cluster: Cluster, opened: OpenedModel, setup: Setup) -> Explained:
    explained = await cluster.plan(opened, _options(setup))
    objective = parse_objective(setup.objective)
    return replanned(explained, objective=objective, workload=_workload(setup))


def _options(setup: Setup) -> LoadOptions:
    cells = setup.prompt + ANSWER
    return LoadOptions(stages=setup.stages, context=cells + -cells % 256, threads=1, recover=False)


def _workload(setup: Setup) -> Workload:
    settings = _options(setup).settings(1 << 20)
    return Workload(setup.prompt, ANSWER, prompt_chunk(setup.prompt, settings.chunk))


def _request_s(times: Times, work: Workload) -> float:
    return times.ttft_s + work.decoded * times.tpot_s


@contextlib.asynccontextmanager
async def _loaded(
    cluster: Cluster, opened: OpenedModel, setup: Setup, explained: Explained
) -> AsyncIterator[LoadedModel]:
    async with cluster.load(opened, _options(setup), plan=explained.plan) as model:
        yield model


async def _measured(model: LoadedModel, setup: Setup) -> tuple[Times, Completion]:
    """Medians over the runs, behind a short one that warms up; and the last answer."""
    chance = random.Random(1)

    def prompt(tokens: int) -> list[int]:
        """Another one each time: of the same one, what was computed before would be used again."""
        return [chance.randrange(3, model.opened.vocab) for _ in range(tokens)]

    await our_run(model, prompt(64), 4)
    answers = [await our_run(model, prompt(setup.prompt), ANSWER) for _ in range(RUNS)]
    ttft = statistics.median(each.figures.ttft_s or 0.0 for each in answers)
    tpot = statistics.median(each.figures.tpot_s or 0.0 for each in answers)
    return Times(ttft, tpot), answers[-1]
