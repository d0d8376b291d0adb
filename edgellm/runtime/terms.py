"""What a plan asks of a stage, and what comes of it on this device. Pure.

``LoadStage`` says what all stages share; a device has its own limits and habits. Nothing here
looks at files or at the machine: what it is like comes as arguments.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgellm.engine.base import StageConfig
from edgellm.store.shards import ShardFiles
from edgellm.types import EngineSettings, LayerSpan, Mode, Weights
from edgellm.wire.care import Rebind
from edgellm.wire.frames import MAX_PAYLOAD_BYTES
from edgellm.wire.messages import Hidden, LoadStage, kind_of, payload_limits
from edgellm.wire.plain import settings_from_plain

CELL_STEP = 256
"""llama.cpp rounds the KV cells of a sequence up to a multiple of this."""
MAX_CELLS = (1 << 31) - 1
"""It counts the cells of all sequences in 32 bits, with a sign in places."""
MIN_UNSENT_BYTES = 4 << 20
_HIDDEN = kind_of(Hidden)


def settings_here(
    request: LoadStage, *, threads: int, pin: tuple[int, ...], plain_weights: Callable[[], bool]
) -> EngineSettings:
    """The plan's settings as this device carries them out: at most ``threads`` threads."""
    settings = settings_from_plain(request.settings)
    if settings.weights is Weights.AUTO:
        # In reference mode the bits are those of llama.cpp as it comes. Tokens of several sequences
        # in a call are what the rearranged kernels are best at (four took 0.8 of the time).
        alone = settings.sequences == 1
        plain = settings.mode is Mode.NORMAL and alone and plain_weights()
        settings = dataclasses.replace(
            settings, weights=Weights.PLAIN if plain else Weights.REPACKED
        )
    return dataclasses.replace(settings, threads=min(settings.threads or threads, threads), pin=pin)


def rows_limits(request: LoadStage, settings: EngineSettings) -> Mapping[int, int]:
    """What the plan allows the stage before to send, bytes by kind."""
    return payload_limits(
        chunk=settings.chunk, width=request.width, activations=settings.activations
    )


def most_unsent(request: LoadStage, settings: EngineSettings) -> int:
    """Bytes of rows that may wait for a stage: the window of all its sequences, with some room."""
    window = (request.stage_count + 2) * settings.sequences
    return max(MIN_UNSENT_BYTES, window * rows_limits(request, settings)[_HIDDEN])


def refusal(request: LoadStage, settings: EngineSettings) -> str:
    """Why a plan with such numbers can not be loaded here, or anywhere; empty where it can."""
    cells = -(-settings.context // CELL_STEP) * CELL_STEP * settings.sequences
    cells = min(cells, settings.cells + CELL_STEP) if settings.cells else cells
    if request.index and not request.previous_id:
        return "the plan does not say which device has the stage before"
    if rows_limits(request, settings)[_HIDDEN] > MAX_PAYLOAD_BYTES:
        return (
            f"chunks of {settings.chunk} rows of {request.width} values are over the"
            f" protocol's limit of {MAX_PAYLOAD_BYTES} bytes"
        )
    if cells > MAX_CELLS:
        return (
            f"{settings.sequences} sequences of {settings.context} tokens are more than"
            f" {MAX_CELLS} KV cells"
        )
    return ""


def rebound(request: LoadStage, rebind: Rebind) -> LoadStage:
    """What would have been asked of the stage if it had been loaded for the plan that it goes
    over to."""
    return dataclasses.replace(
        request,
        epoch=rebind.new_epoch,
        index=rebind.index,
        stage_count=rebind.stage_count,
        next_host=rebind.next_host,
        next_port=rebind.next_port,
        next_id=rebind.next_id,
        previous_id=rebind.previous_id,
    )


def rebind_refusal(request: LoadStage, rebind: Rebind) -> str:
    """Why a stage that ``request`` loaded cannot go over to a plan; empty where it can."""
    if (rebind.index == 0) is not (request.first == 0):
        return f"its layers from {request.first} on are not those of stage {rebind.index + 1}"
    if (rebind.index == rebind.stage_count - 1) is not (request.end == request.layers):
        return f"its layers up to {request.end} of {request.layers} do not end the plan there"
    if (rebind.next_port == 0) is not (request.end == request.layers):
        return "the plan names a next stage where there is none, or none where there is one"
    if rebind.index and not rebind.previous_id:
        return "the plan does not say which device has the stage before"
    return ""


def about(request: LoadStage) -> dict[str, Any]:
    """Which part of which model it is, for people."""
    return {
        "model": str(request.model.get("name", ""))[:200],
        "layers": [request.first, request.end],
        "stage": request.index,
        "stages": request.stage_count,
    }


def model_of(request: LoadStage) -> str:
    """What KV pages name as their model: its digest, or its name where there is no file.

    With adapters, or positions that are stretched otherwise than the model says, it is another
    model as far as its KV cells are concerned.
    """
    model = str(request.model.get("digest") or request.model.get("name") or "")[:200]
    settings = settings_from_plain(request.settings)
    if not settings.stretched and not settings.adapters:
        return model
    scaling = (settings.rope_scaling.value, settings.rope_scale, settings.rope_freq_base)
    return hashlib.sha256(repr((model, scaling, settings.adapters)).encode()).hexdigest()


def stage_config(request: LoadStage, settings: EngineSettings, files: ShardFiles) -> StageConfig:
    """What the stage process is told."""
    return StageConfig(
        engine=engine_of(request),
        span=LayerSpan(request.first, request.end),
        layers=request.layers,
        width=request.width,
        vocab=request.vocab,
        settings=settings,
        shard=str(files.shard),
        embedding=str(files.embedding or ""),
        residual=files.residual,
        input_node=files.input_node,
        fed_tokens=files.fed_tokens,
        embedding_scale=files.embedding_scale,
        model=model_of(request),
        vocabulary=str(files.vocabulary or ""),
        adapters=_scaled(files.adapters, settings),
        embedding_adapters=_scaled(files.embedding_adapters, settings),
    )


def _scaled(files: Mapping[int, Path], settings: EngineSettings) -> tuple[tuple[str, float], ...]:
    """Parts of adapters, by their number in the plan, each with its scale."""
    return tuple((str(files[number]), settings.adapters[number][1]) for number in sorted(files))


def engine_of(request: LoadStage) -> str:
    return str(request.model.get("engine", "llama"))
