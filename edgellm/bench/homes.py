"""Homes and offices at random: devices of the kinds that people have, and what connects them.

Figures are of the order that such devices measure with 4-bit weights; each device differs from its
kind by some part. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgellm.planner import DeviceOffer, DeviceSpeed, Link, Links, Situation, Workload
from edgellm.planner.sketch import ModelSketch
from edgellm.types import DeviceId, EngineSettings

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    memory_gib: tuple[float, ...]
    decode_gb_per_s: float
    prefill_gflops: float
    step_overhead_ms: float
    wired: float
    """How likely it is on a cable."""


_KINDS = (
    _Kind("pi4", (1.5, 3.0, 6.5), 3.0, 12.0, 0.8, 0.6),
    _Kind("pi5", (3.0, 6.5, 14.0), 9.0, 50.0, 0.4, 0.6),
    _Kind("phone", (2.5, 4.0, 7.0), 18.0, 90.0, 0.6, 0.0),
    _Kind("tablet", (3.0, 5.0), 22.0, 110.0, 0.6, 0.0),
    _Kind("laptop", (4.0, 10.0, 20.0), 35.0, 350.0, 0.2, 0.3),
    _Kind("desktop", (10.0, 24.0), 45.0, 700.0, 0.15, 0.9),
    _Kind("mac", (6.0, 12.0, 24.0), 90.0, 2500.0, 0.1, 0.4),
    _Kind("gpu", (5.0, 9.0), 280.0, 20000.0, 0.1, 0.9),
)

MODELS = (
    ModelSketch(22, 2048, 5632, 32, 4, 32000),
    ModelSketch(28, 3072, 8192, 24, 8, 128256, tied_head=True),
    ModelSketch(32, 4096, 14336, 32, 8, 128256),
    ModelSketch(40, 5120, 13824, 40, 40, 32000),
    ModelSketch(48, 2048, 768, 32, 4, 151936, head_size=128, experts=128, experts_used=8),
    ModelSketch(64, 5120, 25600, 64, 8, 151936, head_size=128),
    ModelSketch(80, 8192, 28672, 64, 8, 128256),
)
"""TinyLlama, Llama 3.2 3B, Llama 3 8B, Llama 2 13B, Qwen3 30B-A3B, Qwen3 32B, Llama 3 70B."""
HUGE = ModelSketch(126, 16384, 53248, 128, 8, 128256)
"""Llama 3.1 405B: for offices only."""


@dataclass(frozen=True, slots=True)
class Home:
    """A model, and the devices that are to run it."""

    card: ModelSketch
    settings: EngineSettings
    offers: tuple[DeviceOffer, ...]
    situation: Situation


def random_home(chance: random.Random, least: int = 2, most: int = 8) -> Home:
    """So many devices of any kinds, one of them the coordinator, and the largest model of three
    drawn that their memory together holds."""
    while True:
        made = _drawn(chance, chance.randint(least, most))
        memory = sum(offer.memory_bytes for offer in made.offers)
        fitting = [one for one in chance.sample(MODELS, 3) if one.file_bytes * 1.25 < memory * 0.9]
        if fitting:
            largest = max(fitting, key=lambda one: one.file_bytes)
            return Home(largest, made.settings, made.offers, made.situation)


def random_office(chance: random.Random, count: int, card: ModelSketch) -> Home:
    """So many devices with between 1.3 and 4 times the memory that the model needs."""
    made = _drawn(chance, count)
    memory = sum(offer.memory_bytes for offer in made.offers)
    scale = card.file_bytes * chance.uniform(1.3, 4.0) / memory
    offers = tuple(
        DeviceOffer(one.name, one.device_id, int(one.memory_bytes * scale) + _GIB // 4, one.speed)
        for one in made.offers
    )
    return Home(card, made.settings, offers, made.situation)


def _drawn(chance: random.Random, count: int) -> Home:
    offers: list[DeviceOffer] = []
    wired: list[bool] = []
    for number in range(count):
        kind = chance.choice(_KINDS)

        def near(figure: float) -> float:
            return figure * chance.uniform(0.7, 1.3)

        speed = DeviceSpeed(
            near(kind.decode_gb_per_s) * 1e9,
            near(kind.prefill_gflops) * 1e9,
            near(kind.step_overhead_ms) / 1e3,
        )
        memory = int(chance.choice(kind.memory_gib) * _GIB * chance.uniform(0.6, 1.0))
        device_id = DeviceId(f"{number + 1:064x}")
        offers.append(DeviceOffer(f"{kind.name}-{number + 1}", device_id, memory, speed))
        wired.append(chance.random() < kind.wired)
    workload = Workload(
        prompt_tokens=chance.choice((64, 256, 512, 2048)),
        completion_tokens=chance.choice((64, 128, 512)),
        chunk=64,
    )
    settings = EngineSettings(context=4096)
    links = Links(MappingProxyType(_links(chance, offers, wired)))
    coordinator = chance.choice(offers).device_id
    card = MODELS[0]
    return Home(card, settings, tuple(offers), Situation(links, workload, coordinator))


def _links(
    chance: random.Random, offers: Sequence[DeviceOffer], wired: Sequence[bool]
) -> dict[tuple[DeviceId, DeviceId], Link]:
    """Cables of a gigabit, and one Wi-Fi, where two devices share what there is."""
    wireless_ms = chance.uniform(2.0, 12.0)
    wireless_rate = chance.uniform(6e6, 60e6)
    known = {}
    for a, one in enumerate(offers):
        for b, other in enumerate(offers):
            if a == b:
                continue
            by_air = (not wired[a]) + (not wired[b])
            round_trip = (0.5 + by_air * wireless_ms / 2) * chance.uniform(0.8, 1.3) / 1e3
            rate = 110e6 if not by_air else wireless_rate / by_air
            known[one.device_id, other.device_id] = Link(
                round_trip, rate * chance.uniform(0.8, 1.1)
            )
    return known
