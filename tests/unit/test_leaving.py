"""When a device leaves for its battery."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from edgellm.probe import Conditions
from edgellm.runtime.leaving import battery_low, is_low


@pytest.mark.parametrize(
    ("percent", "on_mains", "low"),
    [
        (9.0, False, True),
        (10.0, False, False),
        (9.0, True, False),
        (9.0, None, False),  # who does not know whether it charges does not leave for it
        (None, False, False),
        (None, None, False),
    ],
)
def test_low_is_below_the_limit_and_not_charging(
    percent: float | None, on_mains: bool | None, low: bool
) -> None:
    assert is_low(Conditions(percent, on_mains), 10) is low
    assert not is_low(Conditions(percent, on_mains), 0)


async def test_a_battery_is_watched_until_it_is_low() -> None:
    def draining() -> Iterator[Conditions]:
        yield Conditions(40.0, False)
        yield Conditions(5.0, True)
        yield Conditions(5.0, False)
        pytest.fail("nobody looks on")

    readings = draining()
    async with asyncio.timeout(5):
        left = await battery_low(10, read=lambda: next(readings), every_s=0.001)
    assert left == 5.0
