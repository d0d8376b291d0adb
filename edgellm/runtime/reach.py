"""Reaching a device that may be at several addresses: all are tried, the quickest is kept.

As Happy Eyeballs does (RFC 8305), but the greeting counts, not the connection: an address where
nothing listens, or where another device answers, is only a miss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.discovery.addresses import Address, format_address, is_loopback
from edgellm.errors import EdgeError, NotPairedError, PeerLostError
from edgellm.runtime.session import Session

STAGGER_S = 0.1
"""Head start of an address over the next one."""
GRACE_S = 0.25
"""Most time that is spent on looking for a quicker way than the first that was found."""
NOTICEABLY = 0.7
"""A way counts as quicker than a likelier one below this share of its time."""
_UNNOTICED_S = 0.002

Dial: TypeAlias = Callable[[str, int], Awaitable[Session]]
"""Connects and greets. Raises EdgeError."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A device greeted at ``address``, ``took_s`` seconds after it was dialed."""

    session: Session
    address: Address
    took_s: float

    @property
    def round_trip_s(self) -> float:
        """At most so long: the dial and the greeting take one round trip each."""
        return self.session.round_trip_s or self.took_s / 2


class OtherDeviceError(PeerLostError):
    """Only other devices than the one looked for answered: ``answers``, all closed."""

    def __init__(self, message: str, answers: Sequence[Answer]) -> None:
        super().__init__(message)
        self.answers = tuple(answers)


def quickest(times: Sequence[float]) -> int:
    """Which of several answers to keep, by the times that they took, the likeliest address first:
    the quickest, unless a likelier one was about as quick."""
    best = 0
    for index, took in enumerate(times):
        if took < times[best] * NOTICEABLY and times[best] - took > _UNNOTICED_S:
            best = index
    return best


async def reach(dial: Dial, addresses: Sequence[Address], device_id: str = "") -> Answer:
    """Connect to the device with this id (whichever is there, if empty) at one of ``addresses``,
    the likeliest first.

    Raises OtherDeviceError when only others are there, NotPairedError when it, or whoever is there,
    does not let us in, else PeerLostError with the reason of each.
    """
    race = _Race(dial, addresses, device_id)
    try:
        return await race.run()
    finally:
        await race.end()


class _Race:
    def __init__(self, dial: Dial, addresses: Sequence[Address], device_id: str) -> None:
        self._dial = dial
        self._addresses = addresses
        self._device_id = device_id
        self._clock = asyncio.get_running_loop().time
        self._tasks: dict[asyncio.Task[Answer], int] = {}
        self._answers: dict[int, Answer] = {}
        self._others: list[Answer] = []
        self._problems: list[str] = []
        self._not_paired: NotPairedError | None = None
        self._kept: Answer | None = None

    async def run(self) -> Answer:
        pending = list(enumerate(self._addresses))
        while not self._answers and (pending or self._tasks):
            if pending:
                self._start(*pending.pop(0))
            await self._wait(STAGGER_S if pending else None)
        if not self._answers:
            self._fail()
        if not any(is_loopback(answer.address[0]) for answer in self._answers.values()):
            await self._look_for_quicker(pending)
        ranked = [self._answers[place] for place in sorted(self._answers)]
        self._kept = ranked[quickest([answer.took_s for answer in ranked])]
        return self._kept

    async def _look_for_quicker(self, pending: Sequence[tuple[int, Address]]) -> None:
        """Whatever takes longer from its own start than the first answer did is no quicker."""
        for each in pending:
            self._start(*each)
        ends = self._clock() + min(GRACE_S, *(a.took_s for a in self._answers.values()))
        while self._tasks and self._clock() < ends:
            await self._wait(ends - self._clock())

    async def end(self) -> None:
        """Nothing of the race goes on, and only the winner stays connected."""
        for task in self._tasks:
            task.cancel()
        late = await asyncio.gather(*self._tasks, return_exceptions=True)
        answers = [*self._answers.values(), *(a for a in late if isinstance(a, Answer))]
        losers = [answer for answer in answers if answer is not self._kept]
        await asyncio.gather(*(answer.session.close() for answer in losers))

    def _start(self, place: int, address: Address) -> None:
        self._tasks[asyncio.create_task(self._try(address))] = place

    async def _try(self, address: Address) -> Answer:
        started = self._clock()
        session = await self._dial(*address)
        return Answer(session, address, self._clock() - started)

    async def _wait(self, seconds: float | None) -> None:
        done, _ = await asyncio.wait(
            self._tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            place = self._tasks.pop(task)
            try:
                answer = task.result()
            except EdgeError as error:
                if isinstance(error, NotPairedError):
                    self._not_paired = error
                self._problems.append(error.message.rstrip("."))
                continue
            if self._device_id and answer.session.peer.device_id != self._device_id:
                self._others.append(answer)
                await answer.session.close()
            elif answer.session.ended:  # an older run of it, or a copy: another may be elsewhere
                self._problems.append(answer.session.reason)
            else:
                self._answers[place] = answer

    def _fail(self) -> None:
        if self._others:
            told = ", ".join(
                f"{each.session.peer.name} at {format_address(*each.address)}"
                for each in self._others
            )
            raise OtherDeviceError(f"another device answered: {told}.", self._others)
        if not self._problems:
            raise PeerLostError("no address of it is known.")
        told = f"{'; '.join(dict.fromkeys(self._problems))}."[:1000]
        if self._not_paired is not None:
            raise NotPairedError(told, hint=self._not_paired.hint)
        raise PeerLostError(told)
