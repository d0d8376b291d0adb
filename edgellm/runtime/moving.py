"""A stage that moves to another device while its requests go on: its device is about to leave.

The successor loads under a new plan while the old one goes on. Then nothing more is sent, what is
in flight is waited for, the KV of every request moves as pages, and the other stages go over.
Nothing is computed again. Where any of it fails, nothing was changed that a recovery needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from edgellm.errors import DeadlineError, EdgeError
from edgellm.runtime.coordinator import Coordinator
from edgellm.runtime.peers import ModelSource
from edgellm.runtime.pipeline import NotCarriedError, Pipeline
from edgellm.runtime.requests import Running
from edgellm.runtime.shares import Share
from edgellm.types import Plan
from edgellm.wire.care import ExpectSequence, ExportSequence, SequenceImported
from edgellm.wire.messages import LoadProgress, PeerAddress

LOOK_EVERY_S = 0.05
"""How often requests are looked at that may have ended meanwhile."""


class Move:
    """Of the stage ``index`` of ``former`` to the device that has it in ``plan``."""

    def __init__(
        self,
        coordinator: Coordinator,
        former: Pipeline,
        plan: Plan,
        index: int,
        source: ModelSource,
        share: Share | None,
    ) -> None:
        self.pages = 0
        self.moved_bytes = 0
        self._coordinator = coordinator
        self._former = former
        self._plan = plan
        self._index = index
        self._source = source
        self._share = share
        self._pipeline: Pipeline | None = None

    async def load(self) -> None:
        """Load the stage on its new device; the old plan goes on. Raises DeviceError."""
        self._pipeline = await self._coordinator.prepare(
            self._plan, self._source, self._share, (self._index,)
        )

    async def carry(self, requests: Callable[[], Collection[Running]], within_s: float) -> Pipeline:
        """Move what the old stage holds of the requests, which are on hold, and go over.

        ``requests`` gives those that are under way now. Raises DeviceError, and DeadlineError
        after ``within_s`` seconds.
        """
        pipeline = self._pipeline
        if pipeline is None:
            raise NotCarriedError("the stage was not loaded anew.")
        try:
            async with asyncio.timeout(within_s):
                for running in list(requests()):
                    await running.settled()
                await self._move_pages(pipeline, requests)
                await self._coordinator.go_over(pipeline, self._former, (self._index,))
        except TimeoutError as error:
            raise DeadlineError("its stage was not moved in time.") from error
        await pipeline.count()
        return pipeline

    async def _move_pages(
        self, pipeline: Pipeline, requests: Callable[[], Collection[Running]]
    ) -> None:
        moving = {
            running.sequence: running.generation.acknowledged
            for running in requests()
            if running.generation.acknowledged and not running.ended
        }
        old, new = self._former.sessions[self._index], pipeline.sessions[self._index]
        epoch = pipeline.plan.epoch
        pipeline.importing = new
        for running in requests():
            running.carried = True  # an error of its sequence is one of the move
        for sequence, position in moving.items():
            new.send(ExpectSequence(epoch, sequence, old.peer.device_id, position))
        for _ in moving:  # whoever is not expected yet is hung up on
            expected = await pipeline.handed.get()
            if isinstance(expected, EdgeError):
                raise NotCarriedError(expected.message, device=expected.device)
        where = self._address()
        for sequence in moving:
            old.send(ExportSequence(self._former.plan.epoch, sequence, epoch, where))
        while moving:
            said = await self._next(pipeline)
            if isinstance(said, EdgeError):
                raise NotCarriedError(said.message, device=said.device)
            if isinstance(said, SequenceImported):
                if moving.pop(said.sequence, said.position) != said.position:
                    raise NotCarriedError("a sequence did not come whole.")
                self.pages += said.pages
                self.moved_bytes += said.received_bytes
            there = {running.sequence for running in requests() if not running.ended}
            for sequence in set(moving) - there:  # given up meanwhile
                del moving[sequence]
        pipeline.importing = None

    @staticmethod
    async def _next(pipeline: Pipeline) -> LoadProgress | SequenceImported | EdgeError | None:
        try:
            async with asyncio.timeout(LOOK_EVERY_S):
                return await pipeline.handed.get()
        except TimeoutError:
            return None

    def _address(self) -> PeerAddress:
        peer = self._coordinator.peers[self._plan.stages[self._index].device]
        return PeerAddress(peer.info.device_id, peer.info.name, peer.host, peer.port)

    def abandon(self) -> None:
        """Free what was loaded for it."""
        if self._pipeline is not None:
            self._coordinator.unload(self._pipeline)
