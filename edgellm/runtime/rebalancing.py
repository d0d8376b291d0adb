"""A loaded model is looked at while it answers, and moved to a better plan between requests.

What its stages take, and what pays, is a ``Tuner``'s to say; here is when to look, and the move:
the new stages load while the old plan goes on, and take over at a moment when no request runs.
Where that fails, the old plan stays. A device without room for two stages ends the old one first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.errors import DeadlineError, EdgeError
from edgellm.runtime.coordinator import Coordinator
from edgellm.runtime.peers import ModelSource
from edgellm.runtime.pipeline import NotCarriedError, Pipeline
from edgellm.runtime.replans import Look, Replan, Tuner
from edgellm.runtime.requests import Running
from edgellm.scheduler.generation import Phase
from edgellm.wire.messages import NO_SEQUENCE, StageTimes

LOOK_EVERY_S = 2.0
"""While requests run."""
QUIET_WITHIN_S = 300.0
"""How long stages that are loaded wait for a moment in which no request runs: they take memory."""


class Host(Protocol):
    """Whose plan it is: ``recovery.LastingPipeline``."""

    pipeline: Pipeline
    paused: bool
    """New requests wait."""

    @property
    def idle(self) -> bool:
        """Whether no request runs, and nothing is lost, leaves or moves."""

    def avoided(self) -> Collection[str]:
        """Devices that are to have no stage."""

    def adopt(self, pipeline: Pipeline) -> None:
        """Have all requests from now on, and those that wait, run over this pipeline."""


@dataclass(slots=True)
class _Mark:
    """How far a request was at the last look."""

    made: int = 0
    last_at: float = 0.0
    begun: bool = False


class Rebalancing:
    """See the module; one a loaded model, from its first request to ``close``."""

    def __init__(
        self,
        coordinator: Coordinator,
        source: ModelSource,
        tuner: Tuner | None,
        tell: Callable[[str], None],
        host: Host,
    ) -> None:
        """Without a ``tuner`` nothing is looked at. ``tell`` hears words for people."""
        self._coordinator = coordinator
        self._source = source
        self._tuner = tuner
        self._tell = tell
        self._host = host
        self._marks: dict[Running, _Mark] = {}
        """Of requests that run, or ran since the last look."""
        self._ended: set[Running] = set()
        self._former: tuple[Pipeline, tuple[Mapping[str, int | float], ...]] | None = None
        """The counters at the last look."""
        self._news = asyncio.Event()
        self._looked_at = 0.0
        self._watching: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None

    # --- requests -----------------------------------------------------------------------

    def began(self, running: Running) -> None:
        """A request runs from now on."""
        if self._tuner is None:
            return
        self._marks[running] = _Mark()
        self._news.set()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(self._tuner))

    def ended(self, running: Running) -> None:
        """It does not any more."""
        if running in self._marks:
            self._ended.add(running)
            self._news.set()

    @property
    def moving(self) -> asyncio.Task[None] | None:
        """The move that is under way."""
        return self._moving

    @property
    def verdict(self) -> str:
        """See ``Tuner``."""
        return self._tuner.verdict if self._tuner is not None else ""

    async def drop(self) -> None:
        """Give up a move that is under way; the old plan stays."""
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)

    async def close(self) -> None:
        tasks = [task for task in (self._watching, self._moving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- looking ------------------------------------------------------------------------

    async def _watch(self, tuner: Tuner) -> None:
        while True:
            await self._due()
            try:
                await self._look(tuner)
                if self._host.idle:
                    await self._improve(tuner)
            except EdgeError:
                pass  # the plan is being replaced, or a stage did not answer: at the next look
            except Exception as bug:  # noqa: BLE001 - requests do not depend on it
                what = f"{type(bug).__name__}: {bug}"
                self._tell(f"The plan is not looked after any more: an internal error, {what}.")
                return

    async def _due(self) -> None:
        """Wait for the next look: for the end of the requests that run, and not for ever."""
        clock = asyncio.get_running_loop().time
        while True:
            under_way = set(self._marks) - self._ended
            if self._ended and not under_way:
                return
            self._news.clear()
            due = self._looked_at + LOOK_EVERY_S if under_way else None
            if due is not None and clock() >= due:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._news.wait()

    async def _look(self, tuner: Tuner) -> None:
        self._looked_at = asyncio.get_running_loop().time()
        pipeline = self._host.pipeline
        marks, ended = dict(self._marks), set(self._ended)
        for running in ended:
            del self._marks[running]
        self._ended -= ended
        after = tuple(await pipeline.stats())
        if pipeline is not self._host.pipeline:
            return
        before = pipeline.counters
        if self._former is not None and self._former[0] is pipeline:
            before = self._former[1]
        self._former = pipeline, after
        look = _look_of(marks, before, after)
        told = tuner.learn(pipeline.plan, look)
        for index, (session, times) in enumerate(zip(pipeline.sessions, told, strict=False)):
            if times:
                session.send(StageTimes(pipeline.plan.epoch, index, dict(times)))

    # --- moving -------------------------------------------------------------------------

    async def _improve(self, tuner: Tuner) -> None:
        """Move to a better plan, if one pays."""
        former = self._host.pipeline
        replan = await tuner.better(former.plan, self._host.avoided())
        if replan is None or former is not self._host.pipeline or former.failed is not None:
            return
        self._moving = asyncio.create_task(self._move(former, replan, tuner))
        try:
            await asyncio.wait({self._moving})
        finally:
            self._moving.cancel()
            self._moving = None

    async def _move(self, former: Pipeline, replan: Replan, tuner: Tuner) -> None:
        fresh = [at for at, cost in enumerate(replan.costs) if cost.fresh]
        self._tell(replan.note)
        started = time.perf_counter()
        try:
            go = self._beside if replan.beside else self._in_place
            pipeline = await go(former, replan, fresh)
        except EdgeError as problem:
            tuner.failed()
            self._tell(f"The layers stay where they are: {problem}")
            return
        tuner.moved(former.plan, pipeline.plan)
        self._tell(f"Moved in {time.perf_counter() - started:.1f} s.")

    async def _beside(self, former: Pipeline, replan: Replan, fresh: Sequence[int]) -> Pipeline:
        """Load while the old plan goes on, and take over once no request runs."""
        pipeline = await self._coordinator.prepare(replan.plan, self._source, replan.share, fresh)
        try:
            await self._quiet()
            if pipeline.failed is not None:
                raise pipeline.failed
            if len(fresh) < len(pipeline.plan.stages):
                with self._pausing(former):
                    await self._coordinator.go_over(pipeline, former, fresh)
                    await pipeline.count()
        except BaseException:
            self._coordinator.unload(pipeline)
            raise
        return self._taken_over(former, pipeline)

    async def _in_place(self, former: Pipeline, replan: Replan, fresh: Sequence[int]) -> Pipeline:
        """Once no request runs, end the old stages and load the new ones in their place; requests
        wait for so long."""
        await self._quiet()
        stays = {
            (stage.device_id, stage.span)
            for at, stage in enumerate(replan.plan.stages)
            if at not in fresh
        }
        with self._pausing(former):
            for at, stage in enumerate(former.plan.stages):
                if (stage.device_id, stage.span) not in stays:
                    former.unload_stage(at)
            pipeline = await self._coordinator.take_over(
                former, replan.plan, self._source, replan.share, fresh
            )
            try:
                await pipeline.count()
            except BaseException:
                self._coordinator.unload(pipeline)
                raise
        return self._taken_over(former, pipeline)

    @contextlib.contextmanager
    def _pausing(self, former: Pipeline) -> Iterator[None]:
        """Requests wait meanwhile. Where it fails, the old plan is of no use as it was, since some
        of its stages may have gone over or ended: a plan is made and loaded anew."""
        self._host.paused = True
        try:
            yield
        except BaseException as error:
            if former.failed is None:
                why = error.message if isinstance(error, EdgeError) else "it was given up."
                former.on_error(NO_SEQUENCE, NotCarriedError(f"the move to another plan: {why}"))
            raise
        finally:
            self._host.paused = False

    def _taken_over(self, former: Pipeline, pipeline: Pipeline) -> Pipeline:
        """Nothing is waited for here: no request can begin over the one or the other."""
        former.watch(None)
        pipeline.forget(former.sequences())
        self._marks.clear()
        self._ended.clear()
        self._host.adopt(pipeline)
        self._coordinator.unload(former)
        return pipeline

    async def _quiet(self) -> None:
        """Wait until no request runs. Raises DeadlineError."""
        try:
            async with asyncio.timeout(QUIET_WITHIN_S):
                while not self._host.idle:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            raise DeadlineError(
                f"requests followed each other for {QUIET_WITHIN_S:.0f} s."
            ) from error


def _look_of(
    marks: Mapping[Running, _Mark],
    before: tuple[Mapping[str, int | float], ...],
    after: tuple[Mapping[str, int | float], ...],
) -> Look:
    """What was counted, and what requests it was for; their marks go on."""
    requests = prompt_tokens = made = 0
    cached_decode = cached_prefill = 0.0
    token_s: float | None = None
    for running, mark in marks.items():
        prompt = running.generation.prompt_length
        total = len(running.generation.tokens) - prompt
        grew = total - mark.made
        if not mark.begun and running.generation.phase is not Phase.NEW:
            mark.begun = True
            requests += 1
            prompt_tokens += prompt
            cached_prefill += prompt * prompt / 2
        made += grew
        cached_decode += grew * (prompt + (mark.made + total) / 2)
        since, count = (mark.last_at, grew) if mark.made else (running.first_at, grew - 1)
        if len(marks) == 1 and count > 0 and running.last_at > since > 0 and not running.recoveries:
            token_s = (running.last_at - since) / count
        mark.made, mark.last_at = total, running.last_at
    return Look(
        before=before,
        after=after,
        requests=requests,
        prompt_tokens=prompt_tokens,
        made=made,
        cached_decode=cached_decode / made if made else 0.0,
        cached_prefill=cached_prefill / prompt_tokens if prompt_tokens else 0.0,
        token_s=token_s,
    )
