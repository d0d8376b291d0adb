"""The coordinator's side of one loaded plan: steps to the first stage, results from the last.

The next step leaves in the same turn of the event loop that its token arrived in; turning the
token into text happens while the stages compute. Who runs over it is ``requests.Running``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from edgellm.errors import EdgeError, StageError
from edgellm.runtime.requests import Running
from edgellm.runtime.session import Session, Traffic
from edgellm.scheduler.generation import SendStep
from edgellm.types import Mode, Plan
from edgellm.wire.care import ResendRows, SequenceImported
from edgellm.wire.frames import Frame
from edgellm.wire.messages import (
    NO_SEQUENCE,
    NO_TOKEN,
    CloseSequence,
    LoadProgress,
    OpenSequence,
    QueryStats,
    Row,
    StageStats,
    Step,
    Tokens,
    UnloadStage,
)
from edgellm.wire.plain import sampler_to_plain
from edgellm.wire.tensors import decode_logits, encode_tokens

STATS_WITHIN_S = 10.0
OnFailed: TypeAlias = "Callable[[Pipeline, EdgeError], None]"
OnLeaving: TypeAlias = Callable[[str, str, float], None]


class NotCarriedError(StageError):
    """Stages that were taken over as they are cannot go on; no device was lost."""


class Pipeline:
    """A loaded plan. Made by ``Coordinator.load``."""

    def __init__(self, plan: Plan, sessions: Sequence[Session], vocab: int) -> None:
        """``sessions`` has the connection to each stage's device, in the plan's order."""
        self.plan = plan
        self.sessions = tuple(sessions)
        self.returned_bytes = 0
        """Bytes of all results that came back from the last stage."""
        self.loads: tuple[dict[str, float], ...] = ({},) * len(self.sessions)
        """What loading each stage took; see ``StageReady``."""
        self._vocab = vocab
        self.began: tuple[Traffic, ...] = tuple(replace(each.traffic) for each in self.sessions)
        """What had gone over each connection before this plan was loaded."""
        self.counters: tuple[Mapping[str, int | float], ...] = ({},) * len(self.sessions)
        """What each stage had counted before this plan: something where it was taken over."""
        self.made = 0
        """Tokens that came of it."""
        self.heard_at = 0.0
        """When the last result came, by the event loop's clock."""
        self._running: dict[int, Running] = {}
        self._failed: EdgeError | None = None
        self.handed: asyncio.Queue[LoadProgress | SequenceImported | EdgeError] = asyncio.Queue()
        """While a stage moves: what its new device says of the sequences that come."""
        self.importing: Session | None = None
        """The connection to that device; None: no stage moves."""
        self._on_failed: OnFailed | None = None
        self._on_leaving: OnLeaving | None = None
        self._unloaded = False
        self._stats: dict[int, asyncio.Future[StageStats]] = {}
        self._asking = asyncio.Lock()

    @property
    def _first(self) -> Session:
        return self.sessions[0]

    @property
    def last(self) -> Session:
        """Where results come from."""
        return self.sessions[-1]

    @property
    def vocab(self) -> int:
        return self._vocab

    @property
    def failed(self) -> EdgeError | None:
        """Why it is of no use any more; None while it is."""
        return self._failed

    @property
    def unloaded(self) -> bool:
        return self._unloaded

    @property
    def watched(self) -> bool:
        """Whether somebody takes care of what remains of it when it fails."""
        return self._on_failed is not None

    def watch(self, on_failed: OnFailed | None, on_leaving: OnLeaving | None = None) -> None:
        """Call ``on_failed`` once when the whole plan fails, instead of failing its requests;
        whoever watches unloads it. At once if it has failed. ``on_leaving`` hears of devices that
        will leave: name, why, within how many seconds."""
        self._on_failed, self._on_leaving = on_failed, on_leaving
        if on_failed is not None and self._failed is not None:
            on_failed(self, self._failed)

    def open(self, running: Running, position: int = 0) -> None:
        """See ``requests.Way``."""
        request = running.request
        self._running[running.sequence] = running
        self._first.send(
            OpenSequence(
                self.plan.epoch,
                running.sequence,
                sampler_to_plain(request.sampler),
                running.remaining_s,
                request.logits,
                position,
                encode_tokens(running.generation.tokens),
            )
        )

    def adopt(self, running: Running) -> None:
        """Announce a request whose acknowledged tokens all stages hold."""
        self.open(running, running.generation.acknowledged)

    def carry(self, running: Running, fresh: int) -> None:
        """Announce a request whose tokens all stages but the ``fresh`` one hold, as far as they
        are acknowledged, and have that one made to hold them: by the rows of the stage before it,
        or by the tokens where it is the first. What the others see again changes nothing there."""
        position = running.generation.acknowledged
        self.open(running, position)
        if not position:
            return
        if fresh:
            resend = ResendRows(self.plan.epoch, running.sequence, position)
            self.sessions[fresh - 1].send(resend)
            return
        exact = self.plan.settings.mode is Mode.REFERENCE
        for step in running.generation.replay(position, exact=exact):
            self.send_step(running, step)

    def sequences(self) -> frozenset[int]:
        """Those that the stages hold."""
        return frozenset(self._running)

    def forget(self, sequences: Collection[int]) -> None:
        """Free what the stages may hold of requests that are gone."""
        for sequence in sequences:
            self._first.send(CloseSequence(self.plan.epoch, sequence))

    def close(self, running: Running) -> None:
        """See ``requests.Way``."""
        if self._running.pop(running.sequence, None) is not None:
            self._first.send(CloseSequence(self.plan.epoch, running.sequence))

    def send_step(self, running: Running, step: SendStep) -> None:
        """Send journal tokens to the first stage."""
        tokens = running.generation.tokens[step.position : step.position + step.count]
        row = Row(running.sequence, step.position, step.count, step.output)
        self._first.send(Step(self.plan.epoch, (row,), encode_tokens(tokens)))

    def on_tokens(self, message: Tokens, frame: Frame) -> None:
        """Results from the last stage."""
        if self._failed is not None:
            return  # whoever goes on elsewhere computes them again
        self.heard_at = asyncio.get_running_loop().time()
        self.returned_bytes += len(frame.raw)
        wanting = [
            result
            for result in message.results
            if result.token != NO_TOKEN
            and (running := self._running.get(result.sequence)) is not None
            and running.request.logits
        ]
        logits = iter(decode_logits(message.payload, len(wanting), self._vocab) if wanting else ())
        for result in message.results:
            self.made += result.token != NO_TOKEN
            running = self._running.get(result.sequence)
            if running is not None:
                row = next(logits) if result in wanting else None
                running.on_result(result.position, result.token, row)

    def on_error(self, sequence: int, error: EdgeError) -> None:
        """A failure of one sequence, or (-1) of the whole plan."""
        if sequence >= 0:
            running = self._running.get(sequence)
            if running is not None and running.carried:
                # Not the request is at fault, but how it was carried over.
                why = NotCarriedError(error.message, device=error.device, hint=error.hint)
                self.on_error(NO_SEQUENCE, why)
            elif running is not None:
                running.fail(error)
            elif self.importing is not None:
                self.handed.put_nowait(error)
            return
        if self._failed is None:
            self._failed = error
            for waiting in self._stats.values():
                if not waiting.done():
                    waiting.set_exception(error)
            if self._on_failed is not None:
                self._on_failed(self, error)
                return
            for running in self._running.values():
                running.fail(error)

    def on_handed(self, session: Session, message: LoadProgress | SequenceImported) -> None:
        """KV pages may come, or all of a sequence's came."""
        if session is not self.importing:
            return
        if isinstance(message, SequenceImported) or not message.total:
            self.handed.put_nowait(message)

    def on_goodbye(self, device: str, reason: str, within_s: float) -> None:
        """A device of the plan will leave."""
        if self._on_leaving is not None:
            self._on_leaving(device, reason, within_s)

    def on_stats(self, message: StageStats) -> None:
        waiting = self._stats.get(message.index)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    async def stats(self) -> list[dict[str, int | float]]:
        """Each stage's counters since it was loaded, in order: seconds, tokens, bytes, peak."""
        async with self._asking:  # answers do not say which question they are for
            if self._failed is not None:
                raise self._failed
            loop = asyncio.get_running_loop()
            self._stats = {index: loop.create_future() for index in range(len(self.sessions))}
            for session in self.sessions:
                session.send(QueryStats(self.plan.epoch))
            try:
                async with asyncio.timeout(STATS_WITHIN_S):
                    answers = await asyncio.gather(*self._stats.values())
            except TimeoutError as error:
                raise StageError("a stage did not tell its figures in time.") from error
        return [dict(answer.stats) for answer in answers]

    async def count(self) -> None:
        """Take the stages' ``counters`` as they are now. Raises StageError."""
        self.counters = tuple(await self.stats())

    def unload_stage(self, index: int) -> None:
        """Have one device free its stage: the plan is of no use any more."""
        self.sessions[index].send(UnloadStage(self.plan.epoch))

    def unload(self) -> None:
        """Have every device free its stage; once, however often it is asked for."""
        if not self._unloaded:
            self._unloaded = True
            self._running.clear()
            for session in self.sessions:
                session.send(UnloadStage(self.plan.epoch))
