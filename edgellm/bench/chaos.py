"""The fault bench: real node processes on this machine, and answers that must survive their end.

Every trial is one answer over three devices. At a moment that the seed decides the fault strikes a
device that holds a stage of it; the tokens are then compared with those of an undisturbed answer.
Afterwards the device is started again, with the same home, and the next trial begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import string
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgellm.answer import GenerateOptions, LoadOptions
from edgellm.bench.faults import (
    Fault,
    Outcome,
    Series,
    Trial,
    damage_against,
    damage_shown,
    seeded_trials,
)
from edgellm.client import Cluster
from edgellm.errors import EdgeError, UsageError
from edgellm.loaded import Answer
from edgellm.localcluster import LocalCluster, local_cluster, local_devices
from edgellm.modelref import OpenedModel
from edgellm.runtime.requests import MadeToken
from edgellm.types import SamplerSettings

STAGES = 3
SPARE = 1
"""Devices more than stages."""
TOKENS = 48
PROMPT_TOKENS = 12
LONG_PROMPT_TOKENS = 192
STOPPED_S = 10.0
BACK_WITHIN_S = 20.0
LEAVES_WITHIN_S = 60.0
DEVICE_BYTES = 1 << 30

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """One series of trials."""

    name: str
    opened: OpenedModel
    fault: Fault
    count: int
    exact: bool = True
    prefill: bool = False
    tokens: int = TOKENS
    """Of the answer."""
    stages: int = STAGES
    """With as many as there are devices, none is free to take a lost stage alone: all of them are
    made anew."""
    within: int | None = None
    """The fault comes in the first so many of them; None: any time."""

    @property
    def prompt(self) -> list[int]:
        """The same for every trial; all of them ordinary tokens."""
        count = LONG_PROMPT_TOKENS if self.prefill else PROMPT_TOKENS
        return [3 + (7 * at) % (self.opened.vocab - 3) for at in range(count)]

    @property
    def options(self) -> LoadOptions:
        layers = self.opened.card.n_layers
        ends = [layers * (index + 1) // self.stages for index in range(self.stages)]
        begins = [0, *ends[:-1]]
        names = string.ascii_lowercase[: self.stages]
        stages = ",".join(
            f"{name}:{begin}-{end}" for name, begin, end in zip(names, begins, ends, strict=True)
        )
        return LoadOptions(stages=stages, exact=self.exact, context=512, chunk=32)


class Fleet:
    """Local devices that die and come back, and a client that is one of their cluster."""

    def __init__(self, local: LocalCluster, cluster: Cluster) -> None:
        self.local = local
        self.cluster = cluster

    def strike(self, name: str, fault: Fault) -> None:
        """Do it to the node process of a device; its stage process goes with it, or stops too."""
        how = {
            Fault.KILL: signal.SIGKILL,
            Fault.STOP: signal.SIGSTOP,
            Fault.LEAVE: signal.SIGTERM,
        }[fault]
        os.kill(self.local.node(name).process.pid, how)

    async def gone(self, name: str) -> None:
        """Wait until the node process has ended."""
        async with asyncio.timeout(LEAVES_WITHIN_S):
            await self.local.node(name).process.wait()

    def wake(self, name: str) -> None:
        os.kill(self.local.node(name).process.pid, signal.SIGCONT)

    async def heal(self) -> None:
        """Every device runs and is connected again. Raises EdgeError where that takes too long."""
        for node in list(self.local.nodes):
            if node.process.returncode is not None:
                await self.local.start_again(node.device.name)
            name = node.device.name
            await self._connected(name, self.local.node(name).address)

    async def _connected(self, name: str, address: str) -> None:
        until = time.monotonic() + BACK_WITHIN_S
        while name not in {peer.info.name for peer in self.cluster.devices()}:
            try:
                await self.cluster.include(address)
            except EdgeError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def fleet(count: int = STAGES + SPARE) -> AsyncIterator[Fleet]:
    """So many devices, none of them in this process."""
    devices = local_devices(
        count, memory_bytes=count * DEVICE_BYTES, processors=(), threads=1, pin=False
    )
    with tempfile.TemporaryDirectory(prefix="edgellm-chaos-") as folder:
        kept = [replace(device, home=Path(folder) / device.name) for device in devices]
        async with (
            local_cluster(kept) as local,
            Cluster.connect(local.addresses, home=local.home) as cluster,
        ):
            yield Fleet(local, cluster)


async def run_series(devices: Fleet, kind: Kind, seed: int, tell: Tell) -> Series:
    """All trials of one kind, one after the other."""
    undisturbed, spacing_s, ttft_s = await _undisturbed(devices, kind)
    trials = seeded_trials(
        kind.fault,
        kind.count,
        seed=seed,
        stages=kind.stages,
        tokens=kind.within or len(undisturbed),
        spacing_s=spacing_s,
        prefill_s=ttft_s if kind.prefill else None,
    )
    outcomes: list[Outcome] = []
    for trial in trials:
        await devices.heal()
        outcome = await _one(devices, kind, trial, undisturbed)
        outcomes.append(outcome)
        tell(f"{kind.name}: {trial.number + 1} of {kind.count}, {_told(outcome)}")
    await devices.heal()
    return Series(kind.name, tuple(outcomes))


def _told(outcome: Outcome) -> str:
    took = "" if outcome.next_token_s is None else f" next token after {outcome.next_token_s:.2f} s"
    damage = outcome.damage
    how = ", ".join(outcome.ways) or "not struck in time"
    wrong = f"lost {damage.lost}, repeated {damage.repeated}, changed {damage.changed}"
    return f"{how}{took}, {wrong}{f'; {outcome.problem}' if outcome.problem else ''}"


def _generate(kind: Kind) -> GenerateOptions:
    return GenerateOptions(
        max_tokens=kind.tokens, sampler=SamplerSettings(temperature=0.0, seed=1), ignore_eos=True
    )


async def _undisturbed(devices: Fleet, kind: Kind) -> tuple[list[int], float, float]:
    """The tokens as they ought to be, the seconds between two of them, and until the first."""
    async with devices.cluster.load(kind.opened, kind.options) as model:
        answer, asked = model.answer(kind.prompt, _generate(kind)), time.perf_counter()
        made = [piece.made async for piece in answer.pieces() if piece.made is not None]
    if len(made) < kind.tokens:
        raise UsageError(
            f"{kind.opened.name} answers {len(made)} tokens, {kind.tokens} are needed."
        )
    spacing = (made[-1].at - made[0].at) / (len(made) - 1)
    return [each.token for each in made], spacing, made[0].at - asked


async def _one(devices: Fleet, kind: Kind, trial: Trial, undisturbed: Sequence[int]) -> Outcome:
    async with devices.cluster.load(kind.opened, kind.options) as model:
        answer = model.answer(kind.prompt, _generate(kind))
        blow = _Blow(devices, trial, model.plan.stages[trial.victim].device)
        made: list[MadeToken] = []
        problem = ""
        try:
            await _read(answer, made, blow)
        except EdgeError as error:
            problem = str(error)
        finally:
            await blow.over()
        return _outcome(kind, trial, answer, made, blow, undisturbed, problem)


async def _read(answer: Answer, made: list[MadeToken], blow: _Blow) -> None:
    blow.counted(0)
    async with contextlib.aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            if piece.made is not None:
                made.append(piece.made)
                blow.counted(len(made))


def _outcome(
    kind: Kind,
    trial: Trial,
    answer: Answer,
    made: Sequence[MadeToken],
    blow: _Blow,
    undisturbed: Sequence[int],
    problem: str,
) -> Outcome:
    damage = damage_shown([each.position for each in made], len(undisturbed))
    if kind.exact and not damage.lost and not damage.repeated:
        damage = damage_against(undisturbed, [each.token for each in made])
    recoveries = answer.recoveries
    detect_s = next_token_s = None
    parts: dict[str, float] = {}
    if recoveries and blow.at is not None:
        first = recoveries[0]
        detect_s = first.missed_at - blow.at
        if first.next_token_s is not None:
            next_token_s = detect_s + first.next_token_s
        told = first.to_dict()
        parts = {
            name: value
            for name, value in told.items()
            if name.endswith("_s") and name not in ("detect_s", "next_token_s") and value
        }
    return Outcome(
        trial=trial,
        damage=damage,
        detect_s=detect_s,
        next_token_s=next_token_s,
        ways=tuple(f"{each.kind} ({each.replay})" for each in recoveries),
        parts=parts,
        problem=problem,
    )


class _Blow:
    """The fault of one trial, when its moment has come."""

    def __init__(self, devices: Fleet, trial: Trial, victim: str) -> None:
        self.at: float | None = None
        """When it struck, by ``time.perf_counter``."""
        self._devices = devices
        self._trial = trial
        self._victim = victim
        self._task: asyncio.Task[None] | None = None

    def counted(self, tokens: int) -> None:
        """So many tokens are there."""
        if tokens == self._trial.after_tokens and self._task is None:
            self._task = asyncio.create_task(self._strike())

    async def _strike(self) -> None:
        await asyncio.sleep(self._trial.delay_s)
        self.at = time.perf_counter()
        self._devices.strike(self._victim, self._trial.fault)
        if self._trial.fault is Fault.LEAVE:
            await self._devices.gone(self._victim)
        elif self._trial.fault is Fault.STOP:
            await asyncio.sleep(STOPPED_S)
            self._devices.wake(self._victim)

    async def over(self) -> None:
        """Wait until all of it has happened."""
        if self._task is not None:
            await self._task
