"""Plans with their predictions: the fastest that fits, or as a person asked. Pure.

The decision which device gets what is ``partition``'s, the seconds are ``cost``'s, the words are
``reasons``'; here they become a ``Plan``, or an error with the numbers that rule it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgellm.errors import NoPlanError, SplitError
from edgellm.planner.cost import CostModel, Prediction, Share
from edgellm.planner.inputs import (
    DeviceOffer,
    ModelCard,
    SpanTable,
    check_offers,
    mib,
    mib_needed,
    offered,
)
from edgellm.planner.manual import ManualStage, check_against
from edgellm.planner.partition import FREE_ORDER, Partition, Wanted, partition_by_speed
from edgellm.planner.reasons import LeftOut, Solo, best_solo, left_out, why_as_asked, why_fastest
from edgellm.planner.speeds import Links, Workload
from edgellm.types import DeviceId, EngineSettings, Epoch, Plan, Stage

_HINT = "A smaller --ctx, a smaller --kv-type or a smaller quantisation needs less."


@dataclass(frozen=True, slots=True)
class Explained:
    """A plan, what it will take, and what was weighed against it."""

    plan: Plan
    prediction: Prediction
    solo: Solo | None
    """The fastest single device that could hold the model; None where there is none."""
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class Situation:
    """What beside the devices decides how fast a plan is."""

    links: Links = field(default_factory=Links)
    workload: Workload = field(default_factory=Workload)
    coordinator_id: DeviceId | None = None
    """The device that sends the tokens in and gets them back; None: none of those that offer."""


def plan_for(
    card: ModelCard,
    offers: Sequence[DeviceOffer],
    settings: EngineSettings,
    epoch: Epoch,
    situation: Situation | None = None,
    *,
    min_stages: int = 1,
    use_all: bool = False,
    partition: Partition = partition_by_speed,
) -> Explained:
    """The plan with the fastest request, one device alone and devices left out among those tried.

    ``min_stages`` asks for at least so many stages, ``use_all`` for a stage on every device
    (as far as the model can be cut). Raises NoPlanError, with the numbers, where nothing fits.
    """
    check_offers(offers)
    if not offers:
        raise NoPlanError("no device offers its memory.", hint="Start one with: edgellm join.")
    cost = _cost(card, offers, settings, situation)
    most = cost.spans.most_stages() if use_all else 0
    wanted = Wanted(min(len(offers), most) if use_all else min_stages)
    shares = partition(cost, wanted)
    if shares is None:
        raise _no_plan(cost, wanted.min_stages)
    prediction, solo = cost.predict(shares), best_solo(cost)
    rest = left_out(cost, wanted, shares, partition)
    why = why_fastest(prediction, solo, rest, wanted.min_stages)
    return Explained(_plan(cost, shares, epoch, why), prediction, solo, rest)


def plan_as_asked(
    card: ModelCard,
    offers: Sequence[DeviceOffer],
    manual: Sequence[ManualStage],
    settings: EngineSettings,
    epoch: Epoch,
    situation: Situation | None = None,
) -> Explained:
    """The plan that ``--stages`` asks for.

    Raises SplitError where the split is not one of this model and these devices, NoPlanError
    where a stage does not fit its device.
    """
    check_offers(offers)
    cost = _cost(card, offers, settings, situation)
    spans = cost.spans
    by_name = {offer.name: at for at, offer in enumerate(offers)}
    number = {cut: at for at, cut in enumerate(spans.cuts)}
    shares = tuple(
        Share(by_name[device], number[first], number[end])
        for device, first, end in check_against(manual, tuple(by_name), spans.cuts)
    )
    short = []
    for share in shares:
        problem = spans.problem(share.first, share.end)
        if problem is not None:
            name = offers[share.device].name
            raise SplitError(f"the stage on {name} cannot run: {problem.rstrip('.')}.")
        offer, need = offers[share.device], spans.memory(share.first, share.end)
        if need > offer.memory_bytes:
            span = spans.span(share.first, share.end)
            short.append(
                f"layers {span.first}-{span.end} need {mib_needed(need)},"
                f" but {offer.name} offers {mib(offer.memory_bytes)}"
            )
    if short:
        raise NoPlanError(f"the split asked for does not fit: {'; '.join(short)}.", hint=_HINT)
    prediction, solo = cost.predict(shares), best_solo(cost)
    why = why_as_asked(prediction, solo)
    return Explained(_plan(cost, shares, epoch, why), prediction, solo, ())


def _cost(
    card: ModelCard,
    offers: Sequence[DeviceOffer],
    settings: EngineSettings,
    situation: Situation | None,
) -> CostModel:
    told = situation or Situation()
    spans = SpanTable(card, settings)
    return CostModel(spans, offers, told.links, told.workload, told.coordinator_id)


def _plan(cost: CostModel, shares: Sequence[Share], epoch: Epoch, why: str) -> Plan:
    spans = cost.spans
    stages = tuple(
        Stage(
            device=cost.offers[share.device].name,
            device_id=cost.offers[share.device].device_id,
            span=spans.span(share.first, share.end),
            memory_bytes=spans.memory(share.first, share.end),
        )
        for share in shares
    )
    return Plan(epoch=epoch, layers=spans.cuts[-1], stages=stages, settings=spans.settings, why=why)


def _no_plan(cost: CostModel, wanted: int) -> NoPlanError:
    spans, offers = cost.spans, cost.offers
    whole = mib_needed(spans.memory(0, spans.pieces))
    numbers = f"the model needs {whole} on one device; {offered(offers)}"
    most = spans.most_stages()
    if wanted > most:
        return NoPlanError(
            f"{wanted} stages were asked for, but the model can be cut into {most} at most."
        )
    if wanted > len(offers):
        return NoPlanError(f"{wanted} stages were asked for, but there are {len(offers)} devices.")
    largest = max(offers, key=lambda offer: offer.memory_bytes)
    legal = [at for at in range(spans.pieces) if spans.problem(at, at + 1) is None]
    at = max(legal, key=lambda piece: spans.memory(piece, piece + 1), default=0)
    need = spans.memory(at, at + 1) if legal else 0
    if need > largest.memory_bytes:
        span = spans.span(at, at + 1)
        numbers += (
            f"; layers {span.first}-{span.end} cannot be cut and alone need {mib_needed(need)}"
        )
    elif wanted > 1:
        numbers += f"; no split into {wanted} stages or more fits"
    else:
        numbers += "; no split over them fits"
        if len(offers) > FREE_ORDER:
            numbers += " in this order"
    return NoPlanError(f"the model does not fit: {numbers}.", hint=_HINT)
