"""What stages and links turn out to take while a model runs, and the speeds that follow. Pure.

A device is as fast as it was measured to be, divided by its slowness: what its stages took, by what
they would have taken at the measured speed. Slowness is a median over the last tokens, so that one
odd answer decides nothing; it comes back to 1 when nothing more is seen. docs/planner.md has the
equations. Seconds, bytes; time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from edgellm.planner.inputs import DeviceOffer
from edgellm.planner.looks import StageLook
from edgellm.planner.pace import parts_of
from edgellm.planner.speeds import (
    Attention,
    DeviceSpeed,
    Link,
    Links,
    Rates,
    settled_speeds,
)
from edgellm.types import DeviceId

MOST_WEIGHT = 64.0
"""One look counts no more than so many tokens, however long the answer was."""
WINDOW = 192.0
"""Tokens that the median is over."""
LOOK_WEIGHT = 32.0
"""What a look at a link counts: six of them fill the window."""
MOST_STEP = 4.0
"""One look may say that something is so many times slower, or faster, than the one before it did:
no more."""
MOST = 32.0
"""And no look that it is so many times slower, or faster, than measured."""
HALF_LIFE_S = 600.0
"""In which half of a slowness is forgotten, as a part of its logarithm, while nothing is seen."""
_LEAST_PART = 0.1
"""Never less than this part of a step's time is the engine's, or of a chunk's its operations'."""
_LEAST_TRIP_S = 0.3e-3
"""Round trips below it are as good as each other: what an event loop takes to answer."""


@dataclass(frozen=True, slots=True)
class Slowness:
    """By how much something takes longer than was measured: 2 is twice as long."""

    seen: tuple[tuple[float, float], ...] = ()
    """(logarithm of the ratio, weight) of the last looks, the latest at the end."""
    at: float = 0.0
    """When the latest was."""

    def after(self, ratio: float, weight: float, now: float) -> Slowness:
        """With one more look. What is no ratio changes nothing, an absurd one no more than an
        absurd one may."""
        if not (0 < ratio < math.inf and weight > 0):  # also NaN
            return self
        left = _left(now - self.at)
        seen = [(value, counted * left) for value, counted in self.seen]
        latest = seen[-1][0] if seen else 0.0
        low, high = latest - math.log(MOST_STEP), latest + math.log(MOST_STEP)
        value = min(max(math.log(ratio), low, -math.log(MOST)), high, math.log(MOST))
        seen.append((value, min(weight, MOST_WEIGHT)))
        room = WINDOW
        kept: list[tuple[float, float]] = []
        for one in reversed(seen):
            if room <= 0:
                break
            kept.append(one)
            room -= one[1]
        return Slowness(tuple(reversed(kept)), now)

    def factor(self, now: float) -> float:
        """As it seems now: 1 where nothing was seen, or not for long."""
        return math.exp(_median(self.seen) * _left(now - self.at))


def _left(seconds: float) -> float:
    """What counts of something so long ago."""
    return float(0.5 ** (max(0.0, seconds) / HALF_LIFE_S))


def _median(seen: Sequence[tuple[float, float]]) -> float:
    """Weighted: half of the weight is on either side of it. 0 of nothing."""
    half = sum(weight for _, weight in seen) / 2
    for value, weight in sorted(seen):
        half -= weight
        if half <= 0:
            return value
    return 0.0


@dataclass(frozen=True, slots=True)
class DeviceCorrection:
    """How one device does, against what was measured of it."""

    speed: DeviceSpeed
    """That: with another measurement, all this is forgotten."""
    measured: bool
    """Whether it was; else it is an assumption."""
    decode: Slowness = field(default_factory=Slowness)
    prefill: Slowness = field(default_factory=Slowness)

    def corrected(self, now: float) -> DeviceSpeed:
        return slowed(self.speed, self.decode.factor(now), self.prefill.factor(now))


@dataclass(frozen=True, slots=True)
class LinkCorrection:
    """How one direction of a link does."""

    link: Link
    """As it was measured."""
    trip: Slowness = field(default_factory=Slowness)
    stream: Slowness = field(default_factory=Slowness)

    def corrected(self, now: float) -> Link:
        trip_s = self.link.round_trip_s
        if self.trip.seen:
            trip_s = max(trip_s, _LEAST_TRIP_S) * self.trip.factor(now)
        return Link(trip_s, self.link.bytes_per_s / self.stream.factor(now))


@dataclass(frozen=True, slots=True)
class Corrections:
    """What was learned so far of devices and links, by their ids."""

    devices: Mapping[DeviceId, DeviceCorrection] = field(
        default_factory=lambda: MappingProxyType({})
    )
    between: Mapping[tuple[DeviceId, DeviceId], LinkCorrection] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def after(self, look: StageLook, now: float) -> Corrections:
        """With one more look at a stage. Too few tokens say nothing."""
        known = self.devices.get(look.device_id)
        if known is None or known.speed != look.speed:
            known = DeviceCorrection(look.speed, look.measured)
        counted, handling_s = look.counted, look.speed.handling_s
        if counted.step_s is not None:
            engine_s = max(counted.step_s - handling_s, counted.step_s * _LEAST_PART)
            ratio = engine_s / max(look.step_s - handling_s, 1e-9)
            known = replace(
                known, decode=known.decode.after(ratio, float(counted.decode_steps), now)
            )
        ratio_of_prompts = _prefill_ratio(look, known.decode.factor(now), known.prefill.factor(now))
        if ratio_of_prompts is not None:
            weight = float(counted.prefill_tokens)
            known = replace(known, prefill=known.prefill.after(ratio_of_prompts, weight, now))
        return replace(self, devices=MappingProxyType({**self.devices, look.device_id: known}))

    def after_link(
        self,
        ends: tuple[DeviceId, DeviceId],
        link: Link,
        now: float,
        *,
        round_trip_s: float | None = None,
        bytes_per_s: float | None = None,
    ) -> Corrections:
        """With one more look at a link, which was measured as ``link``."""
        known = self.between.get(ends)
        if known is None or known.link != link:
            known = LinkCorrection(link)
        if round_trip_s is not None:
            ratio = max(round_trip_s, _LEAST_TRIP_S) / max(link.round_trip_s, _LEAST_TRIP_S)
            known = replace(known, trip=known.trip.after(ratio, LOOK_WEIGHT, now))
        if bytes_per_s:
            ratio = link.bytes_per_s / bytes_per_s
            known = replace(known, stream=known.stream.after(ratio, LOOK_WEIGHT, now))
        return replace(self, between=MappingProxyType({**self.between, ends: known}))

    def offers(self, offers: Sequence[DeviceOffer], now: float) -> tuple[DeviceOffer, ...]:
        """What devices offer, with the speeds that they seem to have now.

        A device that has no stage was not seen. Where all that were seen are slower than measured,
        or all faster, the measurement is at fault rather than they, and it counts as the least of
        them; where its own speed is an assumption, as what is usual among those.
        """
        settled = settled_speeds([offer.speed for offer in offers])
        known = {
            offer.device_id: found
            for offer, speed in zip(offers, settled, strict=True)
            if (found := self.devices.get(offer.device_id)) is not None and found.speed == speed
        }
        decode = _Usual([(one.measured, one.decode.factor(now)) for one in known.values()])
        prefill = _Usual([(one.measured, one.prefill.factor(now)) for one in known.values()])
        corrected = []
        for offer, speed in zip(offers, settled, strict=True):
            found = known.get(offer.device_id)
            if found is not None:
                fast = found.corrected(now)
            elif offer.speed is None and not known:
                corrected.append(offer)  # nothing is known of any
                continue
            else:
                of = offer.speed is not None
                fast = slowed(speed, decode.of(measured=of), prefill.of(measured=of))
            corrected.append(replace(offer, speed=fast))
        return tuple(corrected)

    def links(self, links: Links, now: float) -> Links:
        """The measured links as they seem now; the other direction goes with one that was not
        measured itself."""
        known = dict(links.known)
        for (sender, receiver), found in self.between.items():
            if links.between(sender, receiver) == found.link:
                known[sender, receiver] = found.corrected(now)
                back = (receiver, sender)
                if back not in links.known and back not in self.between:
                    known[back] = found.corrected(now)
        return replace(links, known=MappingProxyType(known))


class _Usual:
    """The slowness of devices that were not seen, from those that were."""

    def __init__(self, seen: Iterable[tuple[bool, float]]) -> None:
        both = list(seen)
        self._measured = _common([factor for measured, factor in both if measured])
        assumed = [(math.log(factor), 1.0) for measured, factor in both if not measured]
        self._assumed = math.exp(_median(assumed)) if assumed else self._measured

    def of(self, *, measured: bool) -> float:
        return self._measured if measured else self._assumed


def _common(factors: Sequence[float]) -> float:
    """What several have in common: the least slowness where all are slower, the least quickness
    where all are quicker. One device alone may have its own reasons."""
    if len(factors) < 2:
        return 1.0
    return max(1.0, min(factors)) if min(factors) > 1.0 else min(1.0, max(factors))


def _prefill_ratio(look: StageLook, decode: float, prefill: float) -> float | None:
    """How much longer a chunk's operations took than they should have, on a device that seemed to
    have these slownesses. None where too little was seen, or where the chunk took as long as
    reading the weights does, which only says that operations take no longer."""
    counted, parts = look.counted, parts_of(look.prefill, look.speed)
    should = counted.chunk * parts.compute_s
    whole = counted.chunk_s
    if whole is None or should <= 0:
        return None
    spent = whole - look.speed.handling_s
    spent -= (look.heads * parts.head_s + parts.overhead_s) * decode
    operations = max(spent, whole * _LEAST_PART)
    if operations <= parts.read_s * decode and operations >= should * prefill:
        return None
    return operations / should


def slowed(speed: DeviceSpeed, decode: float, prefill: float) -> DeviceSpeed:
    """The speed of a device on which all of decoding takes ``decode`` times as long, and the
    operations of prompts ``prefill`` times."""

    def rates(of: Rates) -> Rates:
        return Rates(of.decode_bytes_per_s / decode, of.prefill_flops_per_s / prefill)

    attention = speed.attention
    if attention is not None:
        attention = Attention(
            attention.decode_flops_per_s / decode, attention.prefill_flops_per_s / prefill
        )
    return replace(
        speed,
        decode_bytes_per_s=speed.decode_bytes_per_s / decode,
        prefill_flops_per_s=speed.prefill_flops_per_s / prefill,
        step_overhead_s=speed.step_overhead_s * decode,
        kinds=tuple((kind, rates(of)) for kind, of in speed.kinds),
        attention=attention,
    )
