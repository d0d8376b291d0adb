"""The stage process: ``python -m edgellm.engine.stage_main``, started by a node.

Reads messages from its node over a pipe, computes, writes answers. It owns no socket and no
key. When it dies, for whatever reason, the node sees the end of the pipe and the reason.
"""

from __future__ import annotations

import gc

from edgellm.engine.base import Sampler, StageConfig, StageEngine
from edgellm.engine.childside import open_channel
from edgellm.engine.server import EngineTable, StageServer
from edgellm.types import SamplerSettings
from edgellm.wire.frames import MAX_PAYLOAD_BYTES, FrameDecoder
from edgellm.wire.messages import (
    DEFAULT_PAYLOAD_LIMITS,
    LOCAL_KINDS,
    Hidden,
    StartEngine,
    decode,
    encode,
    kind_of,
)


def _llama(config: StageConfig) -> StageEngine:
    from edgellm.engine.llama import LlamaEngine  # noqa: PLC0415 - loads native code

    return LlamaEngine(config)


def _llama_sampler(settings: SamplerSettings, vocabulary: int) -> Sampler:
    from edgellm.engine.sampling import LlamaSampler  # noqa: PLC0415

    return LlamaSampler(settings, vocabulary)


def _stub(config: StageConfig) -> StageEngine:
    from edgellm.engine.stub import StubEngine  # noqa: PLC0415

    return StubEngine(config)


def _stub_sampler(settings: SamplerSettings, vocabulary: int) -> Sampler:
    from edgellm.engine.stub import StubSampler  # noqa: PLC0415

    return StubSampler()


POLL_S = 0.05
"""Longest active wait for the next step of a sequence: a token's round through slow stages."""

ENGINES: EngineTable = {"llama": (_llama, _llama_sampler), "stub": (_stub, _stub_sampler)}


def main() -> None:
    """Serve until the node closes the pipe."""
    channel = open_channel()
    server = StageServer(ENGINES)
    decoder = FrameDecoder(DEFAULT_PAYLOAD_LIMITS)
    # The node has checked sizes against the plan; what comes through this pipe is its word.
    decoder.set_payload_limit(kind_of(Hidden), MAX_PAYLOAD_BYTES)
    while True:
        if server.expects_work:
            channel.poll(POLL_S)
        data = channel.read()
        if not data:
            return
        for frame in decoder.feed(data):
            message = decode(frame, LOCAL_KINDS)
            for answer in server.handle(message):
                channel.write(encode(answer))
            if isinstance(message, StartEngine):
                gc.freeze()  # what is loaded stays: no collection need look at it again


if __name__ == "__main__":
    main()
