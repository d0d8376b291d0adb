"""The coordinator's side of one loaded plan: requests in, tokens out.

It executes ``scheduler.Generation``: steps go to the first stage, results come from the last.
The next step leaves in the same turn of the event loop that its token arrived in; turning the
token into text happens while the stages compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import DeadlineError, EdgeError, StageError, UsageError
from edgellm.runtime.session import Session
from edgellm.scheduler.generation import (
    Effect,
    Emit,
    Finish,
    Generation,
    SendStep,
    prompt_chunk,
)
from edgellm.types import FinishReason, Plan, SamplerSettings
from edgellm.wire.frames import Frame
from edgellm.wire.messages import (
    NO_TOKEN,
    CloseSequence,
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
MAX_DEADLINE_S = 1e9
"""What the protocol carries."""


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int = 256
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    stop_tokens: frozenset[int] = frozenset()
    deadline_s: float = 600.0
    spent_s: float = 0.0
    """Of the deadline, before the request came here (making tokens of the text)."""
    logits: bool = False
    """Whether each token comes with the logits it was picked from."""


@dataclass(frozen=True, slots=True)
class MadeToken:
    token: int
    position: int
    at: float
    """When it arrived, by ``time.perf_counter``."""
    logits: NDArray[np.float32] | None = None
    """float32 [vocabulary]."""


class Running:
    """One request under way. Iterate ``tokens()``; ``stop`` ends it at once."""

    def __init__(self, pipeline: Pipeline, sequence: int, request: Request) -> None:
        settings = pipeline.plan.settings
        self.sequence = sequence
        self.request = request
        self.finish: FinishReason | None = None
        self.generation = Generation(
            request.prompt,
            max_tokens=request.max_tokens,
            chunk=prompt_chunk(len(request.prompt), settings.chunk, settings.prompt_chunk),
            # One chunk computing in each stage and one waiting for the first.
            window=len(pipeline.plan.stages) + 1,
            context=settings.context,
            stop_tokens=request.stop_tokens,
        )
        self._pipeline = pipeline
        self._queue: asyncio.Queue[MadeToken | EdgeError | None] = asyncio.Queue()
        self._logits: NDArray[np.float32] | None = None

    def begin(self) -> None:
        self._execute(self.generation.begin())

    def on_result(self, position: int, token: int, logits: NDArray[np.float32] | None) -> None:
        self._logits = logits
        self._execute(self.generation.on_result(position, token))

    def stop(self, reason: FinishReason) -> None:
        """End the request; no further token is made for it."""
        self._execute(self.generation.stop(reason))

    def fail(self, error: EdgeError) -> None:
        """End the request with an error, behind the tokens that were made before it."""
        self.generation.stop(FinishReason.CANCELLED)  # nothing more is sent for it
        self._queue.put_nowait(error)

    async def tokens(self) -> AsyncIterator[MadeToken]:
        """The tokens as they are made. Raises the error that ended the request, if one did."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, EdgeError):
                raise item
            yield item

    def _execute(self, effects: Sequence[Effect]) -> None:
        unsent: EdgeError | None = None
        for effect in effects:
            if isinstance(effect, SendStep):
                try:
                    self._pipeline.send_step(self, effect)
                except EdgeError as error:
                    # The token it follows is in the journal: it is shown before the failure.
                    unsent = unsent or error
            elif isinstance(effect, Emit):
                now = time.perf_counter()  # a loop's own clock may tick in milliseconds
                made = MadeToken(effect.token, effect.position, now, self._logits)
                self._queue.put_nowait(made)
            elif isinstance(effect, Finish):
                self.finish = effect.reason
                self._queue.put_nowait(None)
        if unsent is not None:
            self.fail(unsent)


class Pipeline:
    """A loaded plan. Made by ``Coordinator.load``."""

    def __init__(self, plan: Plan, sessions: Sequence[Session], vocab: int) -> None:
        """``sessions`` has the connection to each stage's device, in the plan's order."""
        self.plan = plan
        self.sessions = tuple(sessions)
        self.returned_bytes = 0
        """Bytes of all results that came back from the last stage."""
        self.loads: tuple[dict[str, float], ...] = ()
        """What loading each stage took; see ``StageReady``."""
        self._vocab = vocab
        self._running: dict[int, Running] = {}
        self._numbers = itertools.count(1)
        self._slots = asyncio.Semaphore(plan.settings.sequences)
        self._failed: EdgeError | None = None
        self._unloaded = False
        self._stats: dict[int, asyncio.Future[StageStats]] = {}
        self._asking = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def run(self, request: Request) -> AsyncIterator[Running]:
        """Start a request when a sequence is free; on leaving, its memory is free everywhere.

        Raises UsageError for a prompt that does not fit, DeadlineError when its time is up.
        """
        self._check(request)
        late = DeadlineError(
            f"the request was not done within its deadline of {request.deadline_s:g} s.",
            hint="Give it more time with --deadline.",
        )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.deadline_s - request.spent_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError as error:
            raise late from error
        running = Running(self, next(self._numbers), request)
        # Not a timeout around the yield: it would cancel whatever the caller does at that moment.
        timer = loop.call_at(deadline, running.fail, late)
        try:
            if self._failed is not None:
                raise self._failed
            self._running[running.sequence] = running
            try:
                self._open(running)
                running.begin()
                yield running
            finally:
                del self._running[running.sequence]
                self._first.send(CloseSequence(self.plan.epoch, running.sequence))
        finally:
            timer.cancel()
            self._slots.release()

    def _check(self, request: Request) -> None:
        context = self.plan.settings.context
        if not request.prompt:
            raise UsageError("the prompt is empty.")
        if len(request.prompt) > context:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens, the context holds {context}.",
                hint="Shorten it, or use a larger --ctx.",
            )
        if not all(0 <= token < self._vocab for token in request.prompt):
            raise UsageError(f"the prompt has token ids outside 0 to {self._vocab - 1}.")
        if not all(0 <= token < self._vocab for token, _ in request.sampler.logit_bias):
            raise UsageError(f"logit_bias names a token outside 0 to {self._vocab - 1}.")
        if not 0 < request.deadline_s <= MAX_DEADLINE_S:  # also refuses NaN
            raise UsageError(
                f"a deadline of {request.deadline_s:g} s is outside 0 to {MAX_DEADLINE_S:g} s."
            )
        if request.max_tokens < 1:
            raise UsageError("at least one token must be asked for.")

    @property
    def _first(self) -> Session:
        return self.sessions[0]

    @property
    def last(self) -> Session:
        """Where results come from."""
        return self.sessions[-1]

    def _open(self, running: Running) -> None:
        request = running.request
        self._first.send(
            OpenSequence(
                self.plan.epoch,
                running.sequence,
                sampler_to_plain(request.sampler),
                max(request.deadline_s - request.spent_s, 0.0),
                request.logits,
                0,
                encode_tokens(request.prompt),
            )
        )

    def send_step(self, running: Running, step: SendStep) -> None:
        """Send journal tokens to the first stage."""
        tokens = running.generation.tokens[step.position : step.position + step.count]
        row = Row(running.sequence, step.position, step.count, step.output)
        self._first.send(Step(self.plan.epoch, (row,), encode_tokens(tokens)))

    def on_tokens(self, message: Tokens, frame: Frame) -> None:
        """Results from the last stage."""
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
            running = self._running.get(result.sequence)
            if running is not None:
                row = next(logits) if result in wanting else None
                running.on_result(result.position, result.token, row)

    def on_error(self, sequence: int, error: EdgeError) -> None:
        """A failure of one sequence, or (-1) of the whole plan."""
        if sequence >= 0:
            if running := self._running.get(sequence):
                running.fail(error)
            return
        if self._failed is None:
            self._failed = error
            for running in self._running.values():
                running.fail(error)
            for waiting in self._stats.values():
                if not waiting.done():
                    waiting.set_exception(error)

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

    def unload(self) -> None:
        """Have every device free its stage; once, however often it is asked for."""
        if not self._unloaded:
            self._unloaded = True
            for session in self.sessions:
                session.send(UnloadStage(self.plan.epoch))
