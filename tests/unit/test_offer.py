"""What a device offers, and what plans say of it: batteries, limits, figures that grow old."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import NoPlanError
from edgellm.modelref import open_reference
from edgellm.planner import plan_for
from edgellm.planner.advice import advice
from edgellm.planner.explanation import chapters
from edgellm.planning import offers_of, speed_of
from edgellm.probe import Conditions, DeviceFigures, Probed
from edgellm.probe.figures import KindFigures
from edgellm.runtime import offer
from edgellm.runtime.offer import MEASURING, Offer
from edgellm.settings import NodeSettings, OnBattery
from edgellm.types import EngineSettings, Epoch
from edgellm.wire.messages import DeviceInfo

MIB = 1 << 20
FIGURES = DeviceFigures(
    decode_bytes_per_s=2e10,
    prefill_flops_per_s=2e11,
    step_overhead_s=1e-4,
    handling_s=5e-4,
    decode_attention_flops_per_s=1.6e10,
    prefill_attention_flops_per_s=5e10,
    extra_bytes=3e6,
    kinds=(KindFigures("q6_K", 2.5e10, 2.2e11),),
)
BATTERY, MAINS = Conditions(62.0, False), Conditions(62.0, True)


class Bench:
    """Stands for ``device_figures`` and the conditions that it depends on."""

    def __init__(self) -> None:
        self.conditions = MAINS
        self.idle = True
        self.asked: list[str] = []

    def key(self, threads: int, pin: Sequence[int]) -> str:
        return f"{self.conditions.on_mains} {threads}"

    async def figures(self, folder: Path, **how: Any) -> Probed:
        self.asked.append(self.key(how["threads"], how["pin"]))
        return Probed(FIGURES)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(offer, "device_figures", made.figures)
    monkeypatch.setattr(offer, "conditions_key", made.key)
    return made


@asynccontextmanager
async def offering(bench: Bench, tmp_path: Path, **settings: Any) -> AsyncIterator[Offer]:
    told = NodeSettings(
        name="phone", home=tmp_path, memory_bytes=100 * MIB, threads=3, probe=tmp_path, **settings
    )
    made = Offer(
        told,
        "0" * 64,
        "test",
        lambda notice: None,
        idle=lambda: bench.idle,
        look=lambda: bench.conditions,
        every_s=0.01,
    )
    made.begin()
    try:
        yield made
    finally:
        await made.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.005)


async def test_what_was_measured_is_offered(bench: Bench, tmp_path: Path) -> None:
    async with offering(bench, tmp_path) as made:
        assert made.describe().figures[MEASURING] == 1
        await until(lambda: MEASURING not in made.describe().figures)
        info = made.describe()
    assert (info.memory_total, info.cores) == (100 * MIB, 3)
    assert DeviceFigures.from_plain(info.figures) == FIGURES
    speed = speed_of(info)
    assert speed is not None
    assert speed.handling_s == 5e-4
    assert speed.rates("q6_K").decode_bytes_per_s == 2.5e10
    assert speed.rates("q4_K").decode_bytes_per_s == 2e10
    assert speed.attention is not None
    assert speed.attention.prefill_flops_per_s == 5e10
    (one,) = offers_of([dataclasses.replace(info, engines=("stub",))], "stub")
    assert one.usable_bytes == info.memory_free - 3_000_000


async def test_a_plug_that_is_pulled_changes_what_is_offered(bench: Bench, tmp_path: Path) -> None:
    async with offering(bench, tmp_path, on_battery=OnBattery.CAP) as made:
        await until(lambda: bench.asked == ["True 3"])
        assert made.describe().memory_total == 100 * MIB
        bench.idle = False  # a stage computes: it must not be measured beside it
        bench.conditions = BATTERY
        await until(lambda: made.describe().memory_total == 50 * MIB)
        await asyncio.sleep(0.05)
        assert bench.asked == ["True 3"]
        bench.idle = True
        await until(lambda: bench.asked == ["True 3", "False 3"])
        told = made.describe().figures
    assert told["battery_percent"] == 62
    assert told["decode_bytes_per_s"] == 2e10


async def test_figures_are_asked_for_again_in_time(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offer, "ASK_AGAIN_S", 0.0)
    async with offering(bench, tmp_path):
        await until(lambda: len(bench.asked) > 2)


# --- and what plans say of it -----------------------------------------------------------


def info(name: str, memory: int, conditions: Conditions, policy: OnBattery) -> DeviceInfo:
    offered = int(memory * MIB * conditions.part(policy))
    figures = dataclasses.replace(FIGURES, extra_bytes=0.0)
    return DeviceInfo(
        name, f"{ord(name[0]):064x}", offered, offered, 1, "test", ("stub",),
        {**figures.to_plain(), **conditions.figures(policy)},
    )  # fmt: skip


def test_a_device_on_battery_is_left_out_or_capped_and_the_plan_says_so() -> None:
    card = open_reference("stub:8").card
    desk = info("desk", 9, MAINS, OnBattery.EXCLUDE)
    phone = info("phone", 20, BATTERY, OnBattery.EXCLUDE)
    alone = plan_for(card, offers_of([desk, phone], "stub"), EngineSettings(), Epoch(1))
    (left,) = alone.left_out
    assert left.device == "phone"
    assert "offers 0.0 MiB" in left.reason
    assert "runs on battery (62 % left), and then it is not used" in left.reason
    assert left.reason in " ".join(chapters(alone, advice(alone))[1].lines)
    tablet = info("tablet", 10, BATTERY, OnBattery.CAP)
    desk = info("desk", 6, MAINS, OnBattery.USE)
    both = plan_for(card, offers_of([desk, tablet], "stub"), EngineSettings(), Epoch(1))
    assert [stage.device for stage in both.plan.stages].count("tablet") == 1
    said = " ".join(line for chapter in chapters(both, advice(both)) for line in chapter.lines)
    assert "tablet runs on battery (62 % left), and then it offers half its memory" in said
    with pytest.raises(NoPlanError, match=r"phone offers no memory; phone runs on battery"):
        plan_for(card, offers_of([phone], "stub"), EngineSettings(), Epoch(1))
