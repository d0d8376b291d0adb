"""Plans, and the reasons for them in words: as a person asked, or by memory. Pure.

The decision which device gets what is ``partition``'s; here it becomes a ``Plan``, or an error
with the numbers that rule it out.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.errors import NoPlanError, SplitError
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
from edgellm.planner.partition import FREE_ORDER, Partition, Share, partition_by_memory
from edgellm.types import EngineSettings, Epoch, Plan, Stage

_HINT = "A smaller --ctx, a smaller --kv-type or a smaller quantisation needs less."


def plan_manual(
    card: ModelCard,
    offers: Sequence[DeviceOffer],
    manual: Sequence[ManualStage],
    settings: EngineSettings,
    epoch: Epoch,
) -> Plan:
    """The plan that ``--stages`` asks for.

    Raises SplitError where the split is not one of this model and these devices, NoPlanError
    where a stage does not fit its device.
    """
    check_offers(offers)
    spans = SpanTable(card, settings)
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
    return _plan(spans, offers, shares, settings, epoch, "Split as asked with --stages.")


def plan_by_memory(
    card: ModelCard,
    offers: Sequence[DeviceOffer],
    settings: EngineSettings,
    epoch: Epoch,
    *,
    min_stages: int = 1,
    use_all: bool = False,
    partition: Partition = partition_by_memory,
) -> Plan:
    """One device alone if it can hold the model, else the fewest that can, by their memory.

    ``min_stages`` asks for at least so many stages, ``use_all`` for a stage on every device
    (as far as the model can be cut). Raises NoPlanError, with the numbers, where nothing fits.
    """
    check_offers(offers)
    if not offers:
        raise NoPlanError("no device offers its memory.", hint="Start one with: edgellm join.")
    spans = SpanTable(card, settings)
    wanted = min(len(offers), spans.most_stages()) if use_all else min_stages
    shares = partition(spans, offers, wanted)
    if shares is None:
        raise _no_plan(spans, offers, wanted)
    return _plan(spans, offers, shares, settings, epoch, _why(spans, offers, shares, wanted))


def _plan(
    spans: SpanTable,
    offers: Sequence[DeviceOffer],
    shares: Sequence[Share],
    settings: EngineSettings,
    epoch: Epoch,
    why: str,
) -> Plan:
    stages = tuple(
        Stage(
            device=offers[share.device].name,
            device_id=offers[share.device].device_id,
            span=spans.span(share.first, share.end),
            memory_bytes=spans.memory(share.first, share.end),
        )
        for share in shares
    )
    return Plan(epoch=epoch, layers=spans.cuts[-1], stages=stages, settings=settings, why=why)


def _why(
    spans: SpanTable, offers: Sequence[DeviceOffer], shares: Sequence[Share], wanted: int
) -> str:
    whole = mib_needed(spans.memory(0, spans.pieces))
    chosen = [offers[share.device] for share in shares]
    if len(chosen) == 1:
        only = chosen[0]
        return (
            f"The whole model needs {whole} and {only.name} offers {mib(only.memory_bytes)},"
            " so no other device is needed."
        )
    names = _listed([offer.name for offer in chosen])
    if len(chosen) == wanted:
        reason = f"Split over {names}, because {wanted} stages were asked for"
    else:
        fewer = "no device alone" if len(chosen) == 2 else f"no {len(chosen) - 1} devices"
        reason = f"Split over {names}, because {fewer} can hold the {whole} that the model needs"
    order = [share.device for share in shares]
    if order != sorted(order):
        reason += "; in this order, because the given one does not fit"
    left_out = [offer.name for offer in offers if offer not in chosen]
    if left_out:
        verb = "is" if len(left_out) == 1 else "are"
        reason += f"; {_listed(left_out)} {verb} not needed"
    return f"{reason}; layers are shared out in proportion to memory."


def _no_plan(spans: SpanTable, offers: Sequence[DeviceOffer], wanted: int) -> NoPlanError:
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


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
