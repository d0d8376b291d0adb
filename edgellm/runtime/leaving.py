"""Ending on purpose: whoever uses this device hears of it first, and takes its stages elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from edgellm.probe import Conditions, read_conditions
from edgellm.runtime.session import Session
from edgellm.wire.trust import Goodbye

LEAVE_WITHIN_S = 30.0
"""Longest time that a device which leaves waits for others to take its stages."""
_LOOK_EVERY_S = 0.05
BATTERY_EVERY_S = 30.0
"""A battery loses less than a percent in this time."""


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


def is_low(conditions: Conditions, min_battery: int) -> bool:
    """Whether a device has to leave for its battery: it knows that nothing charges it, and that no
    more than ``min_battery`` percent are left."""
    left = conditions.battery_percent
    return left is not None and conditions.on_mains is False and left < min_battery


async def battery_low(
    min_battery: int,
    *,
    read: Callable[[], Conditions] = read_conditions,
    every_s: float = BATTERY_EVERY_S,
) -> float:
    """Wait until the battery is low; the percent that are left then."""
    while not is_low(conditions := await asyncio.to_thread(read), min_battery):  # noqa: ASYNC110 - a battery tells nobody
        await asyncio.sleep(every_s)
    return conditions.battery_percent or 0.0
