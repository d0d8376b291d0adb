"""The planner against brute force: it finds a plan exactly when one exists, and the best one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import NoPlanError, SplitError
from edgellm.planner import DeviceOffer, parse_stages, plan_by_memory, plan_manual
from edgellm.types import DeviceId, EngineSettings, Epoch, LayerSpan, Plan

SETTINGS = EngineSettings()
EPOCH = Epoch(1)


@dataclass(frozen=True)
class Need:
    total: int


@dataclass(frozen=True)
class TableCard:
    """A model whose stages need what a table says: no monotonicity is assumed."""

    n_layers: int
    boundaries: tuple[int, ...]
    needs: dict[tuple[int, int], int]
    illegal: frozenset[tuple[int, int]] = frozenset()

    def span_problem(self, span: LayerSpan) -> str | None:
        return "one kind of layer only" if (span.first, span.end) in self.illegal else None

    def stage_memory(self, span: LayerSpan, settings: EngineSettings) -> Need:
        assert self.span_problem(span) is None
        return Need(self.needs[span.first, span.end])


@st.composite
def cards(draw: st.DrawFn) -> TableCard:
    layers = draw(st.integers(1, 6))
    boundaries = tuple(sorted(draw(st.sets(st.integers(1, layers - 1))))) if layers > 1 else ()
    if draw(st.booleans()):  # a real model: layers of various sizes, and a constant
        sizes = draw(st.lists(st.integers(1, 30), min_size=layers, max_size=layers))
        base = draw(st.integers(0, 10))
        needs = {
            (a, b): base + sum(sizes[a:b]) for a in range(layers) for b in range(a + 1, layers + 1)
        }
    else:
        needs = {
            (a, b): draw(st.integers(1, 100))
            for a in range(layers)
            for b in range(a + 1, layers + 1)
        }
    # The whole model is always legal; parts of a hybrid need not be, between legal cuts either.
    parts = sorted(set(needs) - {(0, layers)})
    illegal = draw(st.frozensets(st.sampled_from(parts), max_size=4)) if parts else frozenset()
    return TableCard(layers, boundaries, needs, illegal)


offers_lists = st.lists(st.integers(0, 100), min_size=1, max_size=4).map(
    lambda memories: [
        DeviceOffer(f"d{at}", DeviceId(f"{at:064x}"), memory) for at, memory in enumerate(memories)
    ]
)


def all_plans(
    card: TableCard, offers: list[DeviceOffer], stages: int, *, ordered: bool
) -> list[float]:
    """The peak share of memory of every plan with so many stages that fits, by trying them all."""
    peaks = []
    choices = combinations(offers, stages) if ordered else permutations(offers, stages)
    for devices in choices:
        for inner in combinations(card.boundaries, stages - 1):
            cuts = (0, *inner, card.n_layers)
            if card.illegal & set(pairwise(cuts)):
                continue
            needs = [card.needs[a, b] for a, b in pairwise(cuts)]
            if all(n <= d.memory_bytes for n, d in zip(needs, devices, strict=True)):
                peaks.append(max(n / d.memory_bytes for n, d in zip(needs, devices, strict=True)))
    return peaks


def most_stages(card: TableCard) -> int:
    return max(
        len(inner) + 1
        for count in range(len(card.boundaries) + 1)
        for inner in combinations(card.boundaries, count)
        if not card.illegal & set(pairwise((0, *inner, card.n_layers)))
    )


def check_sound(card: TableCard, offers: list[DeviceOffer], plan: Plan) -> None:
    by_name = {offer.name: offer for offer in offers}
    assert len({stage.device for stage in plan.stages}) == len(plan.stages)
    assert plan.layers == card.n_layers
    for stage in plan.stages:
        assert stage.device_id == by_name[stage.device].device_id
        assert stage.memory_bytes == card.needs[stage.span.first, stage.span.end]
        assert stage.memory_bytes <= by_name[stage.device].memory_bytes
        assert stage.span.first in (0, *card.boundaries)


@settings(max_examples=400, deadline=None)
@given(cards(), offers_lists, st.integers(1, 4))
def test_finds_the_best_plan_exactly_when_one_exists(
    card: TableCard, offers: list[DeviceOffer], min_stages: int
) -> None:
    most = min(len(offers), len(card.boundaries) + 1)
    expected = None
    for stages in range(min_stages, most + 1):
        peaks = all_plans(card, offers, stages, ordered=True) or all_plans(
            card, offers, stages, ordered=False
        )
        if peaks:
            expected = (stages, min(peaks))
            break
    if expected is None:
        with pytest.raises(NoPlanError):
            plan_by_memory(card, offers, SETTINGS, EPOCH, min_stages=min_stages)
        return
    plan = plan_by_memory(card, offers, SETTINGS, EPOCH, min_stages=min_stages)
    check_sound(card, offers, plan)
    memory = {offer.name: offer.memory_bytes for offer in offers}
    peak = max(stage.memory_bytes / memory[stage.device] for stage in plan.stages)
    assert (len(plan.stages), peak) == expected


@settings(max_examples=200, deadline=None)
@given(cards(), offers_lists)
def test_use_all_leaves_no_device_out(card: TableCard, offers: list[DeviceOffer]) -> None:
    stages = min(len(offers), most_stages(card))
    possible = bool(all_plans(card, offers, stages, ordered=False))
    try:
        plan = plan_by_memory(card, offers, SETTINGS, EPOCH, use_all=True)
    except NoPlanError:
        assert not possible
        return
    assert possible
    assert len(plan.stages) == stages
    check_sound(card, offers, plan)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(10, 60), min_size=7, max_size=9))
def test_many_devices_in_the_given_order(layers: int, memories: list[int]) -> None:
    """Beyond six devices only the given order is promised; equal layers make it easy to decide."""
    needs = {(a, b): 12 * (b - a) for a in range(layers) for b in range(a + 1, layers + 1)}
    card = TableCard(layers, tuple(range(1, layers)), needs)
    offers = [
        DeviceOffer(f"d{at}", DeviceId(f"{at:064x}"), memory) for at, memory in enumerate(memories)
    ]
    room = [memory // 12 for memory in memories]
    if sum(room) < layers:
        with pytest.raises(NoPlanError):
            plan_by_memory(card, offers, SETTINGS, EPOCH)
        return
    plan = plan_by_memory(card, offers, SETTINGS, EPOCH)
    check_sound(card, offers, plan)
    fewest = next(k for k in range(1, 10) if sum(sorted(room)[-k:]) >= layers)
    assert len(plan.stages) == fewest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.booleans())
def test_a_written_split_is_read_back(lengths: list[int], open_end: bool) -> None:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    spans = list(pairwise(bounds))
    text = ",".join(f"d{at}:{a}-{b}" for at, (a, b) in enumerate(spans))
    if open_end:
        text = text[: text.rindex("-") + 1]
    card = TableCard(bounds[-1], tuple(range(1, bounds[-1])), dict.fromkeys(spans, 1))
    offers = [DeviceOffer(f"d{at}", DeviceId(f"{at:064x}"), 1) for at in range(len(spans))]
    plan = plan_manual(card, offers, parse_stages(text), SETTINGS, EPOCH)
    assert [(s.device, s.span.first, s.span.end) for s in plan.stages] == [
        (f"d{at}", a, b) for at, (a, b) in enumerate(spans)
    ]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:-,0123 \n٣", max_size=20))
def test_any_text_is_a_split_or_a_split_error(text: str) -> None:
    try:
        stages = parse_stages(text)
    except SplitError:
        return
    expected: int | None = 0
    for stage in stages:
        assert stage.first == expected
        expected = stage.end
