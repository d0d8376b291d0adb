"""Ending on purpose: whoever uses this device hears of it first, and takes its stages elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from edgellm.runtime.session import Session
from edgellm.wire.trust import Goodbye

LEAVE_WITHIN_S = 30.0
"""Longest time that a device which leaves waits for others to take its stages."""
_LOOK_EVERY_S = 0.05


async def say_goodbye(
    sessions: Iterable[Session],
    stages_left: Callable[[], int],
    *,
    reason: str,
    within_s: float = LEAVE_WITHIN_S,
) -> int:
    """Tell everyone connected, and wait until no stage is held here any more, or time is up.

    ``reason`` is for people, at most 200 characters. Returns how many stages are left: their
    answers go on elsewhere only from what their coordinators know.
    """
    goodbye = Goodbye(reason[:200], within_s)
    for session in tuple(sessions):
        session.send(goodbye)
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while (left := stages_left()) and loop.time() < until:  # noqa: ASYNC110 - stages end many ways
        await asyncio.sleep(_LOOK_EVERY_S)
    return left
