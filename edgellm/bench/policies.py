"""How others split a model over devices: their rules, as code, for comparison alone.

Each rule gets what it goes by in the original, from the same figures that our planner has, and
answers with one span for each of some devices, in order, or None where it finds nothing. None of
them is told whether its split fits: the simulator says so. What is ours in them is noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from edgellm.bench.homes import Home
from edgellm.planner import DeviceOffer
from edgellm.types import LayerSpan

Stages = list[tuple[DeviceOffer, LayerSpan]]
Policy = Callable[[Home], Stages | None]


# --- what the rules go by -----------------------------------------------------------------


def _weights(home: Home, layers: int) -> int:
    """Bytes of so many layers in a file."""
    outer = home.card.n_embd * home.card.n_vocab * home.card.bits_per_weight / 8
    inner = home.card.file_bytes - outer * (1 if home.card.tied_head else 2)
    return round(inner * layers / home.card.n_layers)


def _memory(home: Home, first: int, end: int) -> int:
    return home.card.stage_memory(LayerSpan(first, end), home.settings).total


def _decode_s(home: Home, offer: DeviceOffer, first: int, end: int) -> float:
    """One token's time, as a profile of the layers on the device would have it."""
    speed = offer.speed
    if speed is None:
        raise ValueError(f"device {offer.name} has not been measured")
    work = home.situation.workload
    cached = work.prompt_tokens + work.completion_tokens // 2
    cost = home.card.stage_work(LayerSpan(first, end), home.settings, cached)
    read = cost.decode_bytes + cost.head_bytes + cost.scan_bytes
    return read / speed.decode_bytes_per_s


def _flops(offer: DeviceOffer) -> float:
    if offer.speed is None:
        raise ValueError(f"device {offer.name} has not been measured")
    return offer.speed.prefill_flops_per_s


def _row_s(home: Home, sender: DeviceOffer, receiver: DeviceOffer) -> float:
    return home.situation.links.between(sender.device_id, receiver.device_id).one_way_s(
        2 * home.card.n_embd
    )


def _in_proportion(layers: int, shares: Sequence[float]) -> list[int]:
    """Whole layers by shares, the largest remainders first."""
    total = sum(shares)
    exact = [layers * share / total for share in shares]
    counts = [math.floor(one) for one in exact]
    most = sorted(range(len(shares)), key=lambda at: counts[at] - exact[at])
    for at in most[: layers - sum(counts)]:
        counts[at] += 1
    return counts


def _stages(offers: Sequence[DeviceOffer], counts: Sequence[int]) -> Stages:
    ends = list(accumulate(counts, initial=0))
    return [
        (offer, LayerSpan(first, end))
        for offer, (first, end) in zip(offers, pairwise(ends), strict=True)
        if end > first
    ]


# --- exo ----------------------------------------------------------------------------------


def exo(home: Home) -> Stages | None:
    """The fewest devices whose memory together holds the weights, those with the most first;
    layers in proportion to memory, at least one each."""
    offers = sorted(home.offers, key=lambda offer: -offer.memory_bytes)
    total = 0
    for count, offer in enumerate(offers, 1):
        total += offer.memory_bytes
        if total >= home.card.file_bytes:
            chosen = offers[:count]
            counts = _in_proportion(home.card.n_layers, [float(one.memory_bytes) for one in chosen])
            return _stages(chosen, counts)
    return None


# --- llama.cpp ----------------------------------------------------------------------------


def llama_cpp(home: Home) -> Stages | None:
    """All devices in the order given, cut where the running share of free memory says so."""
    shares = [float(offer.memory_bytes) for offer in home.offers]
    total = sum(shares)
    if not total:
        return None
    layers = home.card.n_layers + 1  # the output counts as one, and goes with the last device
    running = [part / total for part in accumulate(shares)]
    counts = [0] * len(shares)
    for layer in range(home.card.n_layers):
        at = next((n for n, part in enumerate(running) if part > layer / layers), len(shares) - 1)
        counts[at] += 1
    return _stages(home.offers, counts)


# --- cake ---------------------------------------------------------------------------------


def cake(home: Home) -> Stages | None:
    """Layers in proportion to TFLOPS, none above what its memory holds; what is left over goes
    to the others by the same rule. Devices in the order given."""
    left = home.card.n_layers
    one_layer = _weights(home, 1)
    caps = [offer.memory_bytes * 9 // 10 // one_layer for offer in home.offers]
    counts = [0] * len(home.offers)
    while left:
        open_to = [at for at in range(len(counts)) if counts[at] < caps[at]]
        if not open_to:
            return None
        given = _in_proportion(left, [_flops(home.offers[at]) for at in open_to])
        before = left
        for at, more in zip(open_to, given, strict=True):
            taken = min(more, caps[at] - counts[at])
            counts[at] += taken
            left -= taken
        if left == before:
            return None
    return _stages(home.offers, counts)


# --- Halda (prima.cpp) --------------------------------------------------------------------


def halda_published(home: Home) -> Stages | None:
    """As in the paper: the sum of every device's time for its window and of the links, with
    memory as a row for each device, over all windows in the order of the ring. The links' sum is
    the same for all of them. One round: without layers on disk, more rounds only add links.
    Devices that get one layer alone are dropped, and it is solved again."""
    return _halda(home, _published_s)


def halda_shipped(home: Home) -> Stages | None:
    """As in the code: no communication, compute alone without what memory bandwidth costs, and the
    cache at full context in the memory of each device."""
    return _halda(home, _shipped_s)


def _published_s(home: Home, offer: DeviceOffer) -> float:
    """Seconds of one layer: computing, and reading it from memory."""
    per_layer = home.card.stage_work(LayerSpan(0, 1), home.settings, home.settings.context)
    read = _decode_s(home, offer, 0, 1)
    return per_layer.prefill_flops / _flops(offer) + read


def _shipped_s(home: Home, offer: DeviceOffer) -> float:
    per_layer = home.card.stage_work(LayerSpan(0, 1), home.settings, home.settings.context)
    return per_layer.prefill_flops / _flops(offer)


def _halda(home: Home, layer_s: Callable[[Home, DeviceOffer], float]) -> Stages | None:
    offers = list(home.offers)
    while True:
        counts = _windows(home, offers, layer_s)
        if counts is None:
            return None
        weak = [at for at, count in enumerate(counts) if count <= 1]
        kept = [offer for at, offer in enumerate(offers) if at not in weak]
        if not weak or not kept or _windows(home, kept, layer_s) is None:
            return _stages(offers, counts)
        offers = kept


def _windows(
    home: Home,
    offers: Sequence[DeviceOffer],
    layer_s: Callable[[Home, DeviceOffer], float],
) -> list[int] | None:
    """Windows of one layer or more for every device that has room for one: the least sum gives
    each layer to the quickest device with room."""
    kv = home.card.stage_memory(LayerSpan(0, 2), home.settings).total
    kv -= home.card.stage_memory(LayerSpan(0, 1), home.settings).total
    fixed = home.card.stage_memory(LayerSpan(0, 1), home.settings).total - kv
    head = home.card.n_embd * home.card.n_vocab * home.card.bits_per_weight / 8
    caps = [
        int((offer.usable_bytes - fixed - (head if at == len(offers) - 1 else 0)) // kv)
        for at, offer in enumerate(offers)
    ]
    counts = [1] * len(offers)
    left = home.card.n_layers - len(offers)
    if left < 0 or any(cap < 1 for cap in caps):
        able = [offer for offer, cap in zip(offers, caps, strict=True) if cap >= 1]
        if left < 0 or not able or len(able) == len(offers):
            return None
        among = _windows(home, able, layer_s)
        if among is None:
            return None
        by_name = {offer.name: count for offer, count in zip(able, among, strict=True)}
        return [by_name.get(offer.name, 0) for offer in offers]
    for at in sorted(range(len(offers)), key=lambda one: layer_s(home, offers[one])):
        more = min(left, caps[at] - 1)
        counts[at] += more
        left -= more
    return None if left else counts


# --- EdgeShard ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Way:
    """The best way of EdgeShard's recurrence to a layer on a device."""

    value: float
    stages: tuple[tuple[int, int, int], ...]
    """Device, first layer and end."""


def edgeshard_latency(home: Home) -> Stages | None:
    """DP(layer, device) = min over the device before of DP + computing + sending, memory as far
    as the best way to there knows it. A device that was left is not gone back to: our pipeline,
    and most others, have one span a device."""
    offers, layers = home.offers, home.card.n_layers
    source = next(
        (at for at, one in enumerate(offers) if one.device_id == home.situation.coordinator_id), 0
    )
    ways: dict[int, _Way] = {}
    for at, offer in enumerate(offers):
        if _memory(home, 0, 1) <= offer.usable_bytes:
            sent = 0.0 if at == source else _row_s(home, offers[source], offer)
            ways[at] = _Way(sent + _decode_s(home, offer, 0, 1), ((at, 0, 1),))
    for layer in range(1, layers):
        now: dict[int, _Way] = {}
        for at, offer in enumerate(offers):
            took = _decode_s(home, offer, layer, layer + 1)
            for before, way in ways.items():
                value = way.value + took
                if before == at:
                    first = way.stages[-1][1]
                    stages = (*way.stages[:-1], (at, first, layer + 1))
                else:
                    if any(at == device for device, _, _ in way.stages):
                        continue
                    first = layer
                    value += _row_s(home, offers[before], offer)
                    stages = (*way.stages, (at, layer, layer + 1))
                if layer + 1 == layers and at != source:
                    value += _row_s(home, offer, offers[source])
                if _memory(home, first, layer + 1) > offer.usable_bytes:
                    continue
                if at not in now or value < now[at].value:
                    now[at] = _Way(value, stages)
        ways = now
    if not ways:
        return None
    best = min(ways.values(), key=lambda way: way.value)
    return [(offers[at], LayerSpan(first, end)) for at, first, end in best.stages]


def edgeshard_throughput(home: Home) -> Stages | None:
    """The least time of the slowest stage or link, over (devices in use, last device, layer)."""
    offers, layers = home.offers, home.card.n_layers
    count = len(offers)
    stage_s = np.full((count, layers + 1, layers + 1), np.inf)
    for first in range(layers):
        for end in range(first + 1, layers + 1):
            need = _memory(home, first, end)
            for at, offer in enumerate(offers):
                if need <= offer.usable_bytes:
                    stage_s[at, first, end] = _decode_s(home, offer, first, end)
    send = np.array([[_row_s(home, a, b) if a is not b else 0.0 for b in offers] for a in offers])
    best = np.full((1 << count, count, layers + 1), np.inf)
    for chosen in range(1, 1 << count):
        for at in range(count):
            rest = chosen ^ 1 << at
            if not chosen >> at & 1:
                continue
            if rest:
                before = np.maximum(best[rest], send[:, at, None]).min(axis=0)
            else:
                before = np.full(layers + 1, np.inf)
                before[0] = 0.0
            best[chosen, at] = np.maximum(before[:, None], stage_s[at]).min(axis=0)
    chosen, at = (int(one) for one in np.unravel_index(best[..., -1].argmin(), (1 << count, count)))
    if not np.isfinite(best[chosen, at, -1]):
        return None
    stages: Stages = []
    end = layers
    while chosen:
        rest = chosen ^ 1 << at
        if rest:
            ways = np.maximum(best[rest], send[:, at, None])
        else:
            ways = np.full((1, layers + 1), np.inf)
            ways[0, 0] = 0.0
        first = int(np.maximum(ways.min(axis=0), stage_s[at, :, end]).argmin())
        stages.append((offers[at], LayerSpan(first, end)))
        chosen, at, end = rest, int(ways[:, first].argmin()), first
    return stages[::-1]


POLICIES: dict[str, Policy] = {
    "exo: by memory": exo,
    "llama.cpp: by free memory": llama_cpp,
    "cake: by TFLOPS": cake,
    "Halda as published": halda_published,
    "Halda as shipped": halda_shipped,
    "EdgeShard, latency": edgeshard_latency,
    "EdgeShard, throughput": edgeshard_throughput,
}
