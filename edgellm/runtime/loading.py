"""What a coordinator says to the devices of a plan, so that each has its stage. Plain data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgellm.runtime.peers import ModelSource, Peer
from edgellm.types import Plan
from edgellm.wire.care import Rebind
from edgellm.wire.messages import FileWanted, LoadStage, PeerAddress
from edgellm.wire.plain import settings_to_plain


def load_request(
    plan: Plan,
    source: ModelSource,
    peers: Sequence[Peer],
    index: int,
    files: Sequence[FileWanted],
    known: Sequence[Peer],
    within_s: float,
) -> LoadStage:
    """To the device of stage ``index``: ``peers`` are those of the plan, in its order; ``known``
    are all that may hold tensors; ``files`` say what the stage is made of."""
    span = plan.stages[index].span
    after = peers[index + 1] if index + 1 < len(peers) else None
    settings = dataclasses.replace(
        plan.settings, threads=plan.settings.threads or peers[index].info.cores
    )
    return LoadStage(
        epoch=plan.epoch,
        index=index,
        stage_count=len(peers),
        first=span.first,
        end=span.end,
        layers=plan.layers,
        model={
            "engine": source.engine,
            "name": source.name,
            "path": source.path if peers[index].session.local or not source.digest else "",
            "digest": source.digest,
        },
        settings=settings_to_plain(settings),
        next_host=after.host if after else "",
        next_port=after.port if after else 0,
        width=source.width,
        vocab=source.vocab,
        deadline_s=within_s,
        next_id=after.info.device_id if after else "",
        previous_id=peers[index - 1].info.device_id if index else "",
        files=tuple(files),
        sources=tuple(
            PeerAddress(peer.info.device_id, peer.info.name, peer.host, peer.port) for peer in known
        ),
    )


def rebind_request(plan: Plan, epoch: int, peers: Sequence[Peer], index: int) -> Rebind:
    """To the device of stage ``index``, which has it already in the plan ``epoch``."""
    after = peers[index + 1] if index + 1 < len(peers) else None
    return Rebind(
        epoch=epoch,
        new_epoch=plan.epoch,
        index=index,
        stage_count=len(peers),
        next_host=after.host if after else "",
        next_port=after.port if after else 0,
        next_id=after.info.device_id if after else "",
        previous_id=peers[index - 1].info.device_id if index else "",
    )
