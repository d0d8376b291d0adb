"""Splits as people type them, and what the planner says about its choice."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from edgellm.errors import NoPlanError, SplitError, UsageError
from edgellm.planner import (
    DeviceOffer,
    ManualStage,
    parse_stages,
    plan_by_memory,
    plan_manual,
)
from edgellm.planner.inputs import mib, mib_needed
from edgellm.types import DeviceId, EngineSettings, Epoch, LayerSpan

MIB = 1 << 20
SETTINGS = EngineSettings()
EPOCH = Epoch(7)


@dataclass(frozen=True)
class Need:
    total: int


@dataclass(frozen=True)
class EvenCard:
    """Equal layers of 10 MiB, an embedding and a head of 5 MiB each, 1 MiB for every stage."""

    n_layers: int = 8
    boundaries: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    asked: list[LayerSpan] = field(default_factory=list)

    def span_problem(self, span: LayerSpan) -> str | None:
        return None

    def stage_memory(self, span: LayerSpan, settings: EngineSettings) -> Need:
        self.asked.append(span)
        ends = (span.first == 0) + (span.end == self.n_layers)
        return Need(MIB * (1 + 10 * len(span) + 5 * ends))


def offer(name: str, mebibytes: int) -> DeviceOffer:
    return DeviceOffer(name, DeviceId(name.encode().hex().zfill(64)), mebibytes * MIB)


A, B, C = offer("a", 100), offer("b", 60), offer("c", 40)


def test_parse_stages() -> None:
    assert parse_stages("a:0-3, b:3-") == (ManualStage("a", 0, 3), ManualStage("b", 3, None))
    assert parse_stages("kitchen-pi.local:0-") == (ManualStage("kitchen-pi.local", 0, None),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not DEVICE:FIRST-END"),
        ("a", "'a' in --stages"),
        ("a:0-3,", "is not DEVICE:FIRST-END"),
        ("a:0-3;b:3-5", "is not DEVICE:FIRST-END"),
        ("a:-3", "is not DEVICE:FIRST-END"),
        ("a:0-9999999", "is not DEVICE:FIRST-END"),
        ("a:3-3", "3-3 of device a is empty"),
        ("a:0-3,b:2-5", "overlap"),
        ("b:3-5,a:0-3", "no stage has layers 0 to 2"),
        ("a:0-3,b:3-6,c:0-2", "out of order"),
        ("a:0-3,b:4-5", "no stage has layer 3"),
        ("a:1-3", "no stage has layer 0"),
        ("a:0-3,a:3-5", "a is named twice"),
        ("a:0-,b:3-5", "after a stage that runs to the last layer"),
        (",".join(["a:0-1"] * 1000), "1000 stages"),
    ],
)
def test_bad_stages(text: str, says: str) -> None:
    with pytest.raises(SplitError, match=says) as caught:
        parse_stages(text)
    assert caught.value.exit_code == 2


def test_plan_manual() -> None:
    plan = plan_manual(EvenCard(), [A, B, C], parse_stages("b:0-3,a:3-"), SETTINGS, EPOCH)
    assert [(s.device, s.span.first, s.span.end) for s in plan.stages] == [
        ("b", 0, 3),
        ("a", 3, 8),
    ]
    assert plan.stages[0].memory_bytes == 36 * MIB
    assert plan.stages[0].device_id == B.device_id
    assert plan.epoch == EPOCH
    assert plan.settings is SETTINGS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:0-3,z:3-8", "no device 'z'; known devices: a, b, c"),
        ("a:0-3,b:3-9", "has only 8 layers"),
        ("a:0-8,b:8-", "has only 8 layers"),
        ("a:0-3,b:3-5", "no stage has layers 5 to 7"),
        ("a:0-3,b:3-7", "no stage has layer 7"),
    ],
)
def test_a_split_that_is_not_this_models(text: str, says: str) -> None:
    with pytest.raises(SplitError, match=says):
        plan_manual(EvenCard(), [A, B, C], parse_stages(text), SETTINGS, EPOCH)


def test_an_illegal_cut_names_legal_ones() -> None:
    card = EvenCard(boundaries=(2, 4, 6))
    with pytest.raises(SplitError, match="cannot be cut before layer 3") as caught:
        plan_manual(card, [A, B], parse_stages("a:0-3,b:3-"), SETTINGS, EPOCH)
    assert caught.value.hint == "It can be cut before layer 2, 4, 6."
    with pytest.raises(SplitError, match="one device only"):
        plan_manual(EvenCard(boundaries=()), [A, B], parse_stages("a:0-3,b:3-"), SETTINGS, EPOCH)


@dataclass(frozen=True)
class HybridCard(EvenCard):
    """Every fourth layer has attention, and every stage needs one such."""

    def span_problem(self, span: LayerSpan) -> str | None:
        return None if 3 in span or 7 in span else f"{span} holds no attention layer."


def test_spans_that_cannot_run_are_never_planned() -> None:
    with pytest.raises(SplitError, match=r"the stage on a cannot run: .* no attention layer\."):
        plan_manual(HybridCard(), [A, B], parse_stages("a:0-3,b:3-"), SETTINGS, EPOCH)
    same = [offer(name, 1000) for name in "abc"]
    plan = plan_by_memory(HybridCard(), same, SETTINGS, EPOCH, use_all=True)
    assert [(s.span.first, s.span.end) for s in plan.stages] == [(0, 4), (4, 8)]
    with pytest.raises(NoPlanError, match="can be cut into 2 at most"):
        plan_by_memory(HybridCard(), same, SETTINGS, EPOCH, min_stages=3)


def test_a_manual_split_that_does_not_fit_gives_the_numbers() -> None:
    with pytest.raises(NoPlanError, match=r"layers 3-8 need 56\.0 MiB, but c offers 40\.0 MiB"):
        plan_manual(EvenCard(), [A, C], parse_stages("a:0-3,c:3-8"), SETTINGS, EPOCH)


def test_one_device_is_preferred_and_the_largest() -> None:
    plan = plan_by_memory(EvenCard(), [offer("s", 95), A], SETTINGS, EPOCH)
    assert [s.device for s in plan.stages] == ["a"]
    assert "needs 91.0 MiB and a offers 100.0 MiB" in plan.why


def test_the_fewest_devices_share_in_proportion() -> None:
    plan = plan_by_memory(EvenCard(), [offer("x", 30), B, C], SETTINGS, EPOCH)
    assert [(s.device, len(s.span)) for s in plan.stages] == [("b", 5), ("c", 3)]
    assert "no device alone can hold the 91.0 MiB" in plan.why
    assert "x is not needed" in plan.why


def test_use_all_spreads_over_every_device() -> None:
    same = [offer(name, 1000) for name in "abc"]
    plan = plan_by_memory(EvenCard(), same, SETTINGS, EPOCH, use_all=True)
    assert [s.device for s in plan.stages] == ["a", "b", "c"]
    assert sorted(len(s.span) for s in plan.stages) == [2, 3, 3]
    assert "3 stages were asked for" in plan.why


def test_use_all_of_a_model_with_few_cuts() -> None:
    same = [offer(name, 1000) for name in "abc"]
    plan = plan_by_memory(EvenCard(boundaries=(4,)), same, SETTINGS, EPOCH, use_all=True)
    assert len(plan.stages) == 2


def test_another_order_when_the_given_one_does_not_fit() -> None:
    @dataclass(frozen=True)
    class HeavyHead:
        n_layers: int = 2
        boundaries: tuple[int, ...] = (1,)

        def span_problem(self, span: LayerSpan) -> str | None:
            return None

        def stage_memory(self, span: LayerSpan, settings: EngineSettings) -> Need:
            return Need(MIB * (10 * (0 in span) + 50 * (1 in span)))

    plan = plan_by_memory(HeavyHead(), [offer("big", 55), offer("small", 10)], SETTINGS, EPOCH)
    assert [s.device for s in plan.stages] == ["small", "big"]
    assert "the given one does not fit" in plan.why


def test_no_plan_gives_the_numbers() -> None:
    with pytest.raises(NoPlanError, match=r"needs 91\.0 MiB.*b offers 60\.0 MiB, d offers 20") as e:
        plan_by_memory(EvenCard(), [B, offer("d", 20)], SETTINGS, EPOCH)
    assert e.value.exit_code == 3
    with pytest.raises(NoPlanError, match=r"alone need 16\.0 MiB"):
        plan_by_memory(EvenCard(), [offer("d", 12), offer("e", 15)], SETTINGS, EPOCH)
    with pytest.raises(NoPlanError, match="no device offers"):
        plan_by_memory(EvenCard(), [], SETTINGS, EPOCH)
    with pytest.raises(NoPlanError, match="but there are 2 devices"):
        plan_by_memory(EvenCard(), [A, B], SETTINGS, EPOCH, min_stages=3)
    with pytest.raises(NoPlanError, match="can be cut into 1 at most"):
        plan_by_memory(EvenCard(boundaries=()), [A, B], SETTINGS, EPOCH, min_stages=2)


def test_bad_offers() -> None:
    twin = DeviceOffer("a", DeviceId("0" * 64), MIB)
    with pytest.raises(UsageError, match="two devices have the name 'a'"):
        plan_by_memory(EvenCard(), [A, twin], SETTINGS, EPOCH)
    with pytest.raises(UsageError, match="two devices have the device id"):
        plan_by_memory(EvenCard(), [A, DeviceOffer("z", A.device_id, 1)], SETTINGS, EPOCH)
    with pytest.raises(UsageError, match="offers -1 bytes"):
        DeviceOffer("a", DeviceId("0" * 64), -1)


def test_numbers_never_read_as_enough_when_they_are_not() -> None:
    assert mib(100 * MIB - 1) == "99.9 MiB"
    assert mib_needed(100 * MIB + 1) == "100.1 MiB"
    assert mib(100 * MIB) == mib_needed(100 * MIB) == "100.0 MiB"


def test_a_large_model_on_many_devices_is_planned_quickly() -> None:
    card = EvenCard(126, tuple(range(1, 126)))
    offers = [offer(f"d{at}", 90 + at) for at in range(16)]
    begin = time.perf_counter()
    plan = plan_by_memory(card, offers, SETTINGS, EPOCH)
    assert time.perf_counter() - begin < 10  # about 1 s; far more would be another complexity
    assert len(card.asked) == len(set(card.asked))
    assert len(plan.stages) == 14
