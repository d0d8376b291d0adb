"""Requests wait here for a slot of a loaded model, as ``scheduler.admission`` says.

No connection is used here, and nothing is planned: whoever has a slot is started by others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence

from edgellm.runtime.requests import Running
from edgellm.scheduler.admission import PAGE_TOKENS, Admission, Effect, Preempt
from edgellm.types import EngineSettings

MAX_WAITING = 256
"""Requests that may wait for one model unless somebody says otherwise."""


class Slots:
    """See the module; one a loaded model."""

    def __init__(
        self,
        settings: EngineSettings,
        go_on: Callable[[Running], None],
        leave_room: Callable[[int], None],
        line: int = MAX_WAITING,
    ) -> None:
        """``go_on`` starts a request again that was preempted and has a slot now. ``leave_room`` is
        told how many pages of KV may be used for what nobody needs now, where they are shared. At
        most ``line`` requests wait."""
        self._counts_pages = settings.total_cells < settings.context * settings.sequences
        pages = settings.total_cells // PAGE_TOKENS if self._counts_pages else 0
        self._admission = Admission(slots=settings.sequences, pages=pages, line=line)
        self._go_on = go_on
        self._leave_room = leave_room
        self._numbers = itertools.count(1)
        self._tickets: dict[Running, int] = {}
        self._running: dict[int, Running] = {}
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._clock = asyncio.get_running_loop().time

    @property
    def waiting(self) -> int:
        """Requests that have no slot now."""
        return len(self._admission.waiting)

    @contextlib.asynccontextmanager
    async def slot(self, running: Running) -> AsyncIterator[None]:
        """A slot, as soon as it is the request's turn, until it ends. Its time runs from its
        beginning: it fails when that is up.

        Raises BusyError at once where too many wait, DeadlineError for one that has waited until
        its time was up.
        """
        try:
            try:
                async with asyncio.timeout_at(running.deadline):
                    await self._take(running)
            except TimeoutError as error:
                raise running.request.late from error
            # Not a timeout around the yield: it would cancel whatever the caller does at the time.
            loop, late = asyncio.get_running_loop(), running.request.late
            timer = loop.call_at(running.deadline, running.fail, late)
            try:
                yield
            finally:
                timer.cancel()
        finally:
            self._leave(running)

    async def _take(self, running: Running) -> None:
        ticket = self._tickets[running] = next(self._numbers)
        self._running[ticket] = running
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        running.on_over = lambda: self._leave(running)
        if self._counts_pages:
            running.on_growth = lambda tokens: self._carry_out(
                self._admission.grow(ticket, tokens, self._clock())
            )
        tokens, priority = len(running.generation.tokens), running.request.priority
        self._carry_out(self._admission.arrive(ticket, tokens, priority, self._clock()))
        try:
            while True:
                await turn
                # Others may have come first since then.
                if (latest := self._turns[ticket]) is turn:
                    break
                turn = latest
        finally:
            del self._turns[ticket]

    def _leave(self, running: Running) -> None:
        """Give the slot to the next; harmless when repeated."""
        ticket = self._tickets.pop(running, None)
        if ticket is not None:
            del self._running[ticket]
            self._carry_out(self._admission.leave(ticket, self._clock()))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            running = self._running.get(effect.ticket)
            if running is not None and isinstance(effect, Preempt):
                running.preempt()
                if effect.ticket in self._turns:  # it did not even begin
                    self._turns[effect.ticket] = asyncio.get_running_loop().create_future()
        if self._counts_pages:
            self._leave_room(self._admission.free_pages)
        for effect in effects:
            running = self._running.get(effect.ticket)
            if running is None or isinstance(effect, Preempt):
                continue
            running.waits = False
            turn = self._turns.get(effect.ticket)
            if turn is None:
                self._go_on(running)
            elif not turn.done():
                turn.set_result(None)
