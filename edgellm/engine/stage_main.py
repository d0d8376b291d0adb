"""The stage process: ``python -m edgellm.engine.stage_main``, started by a node.

Reads messages from its node over a pipe, computes, writes answers. It owns no socket and no
key. When it dies, for whatever reason, the node sees the end of the pipe and the reason.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from edgellm.engine.base import Sampler, StageConfig, StageEngine, refuse_grammar
from edgellm.engine.childside import open_channel
from edgellm.engine.server import EngineTable, StageServer
from edgellm.errors import EdgeError
from edgellm.types import SamplerSettings
from edgellm.wire.care import KvPage
from edgellm.wire.frames import MAX_PAYLOAD_BYTES, Buffer, Frame, FrameDecoder
from edgellm.wire.messages import (
    DEFAULT_PAYLOAD_LIMITS,
    LOCAL_KINDS,
    CloseSequence,
    Hidden,
    Message,
    Row,
    StartEngine,
    Step,
    decode,
    encode,
    kind_of,
)
from edgellm.wire.tags_care import MAX_PAGE_BYTES


def _llama(config: StageConfig) -> StageEngine:
    from edgellm.engine.llama import LlamaEngine  # noqa: PLC0415 - loads native code

    return LlamaEngine(config)


def _llama_sampler(settings: SamplerSettings, config: StageConfig) -> Sampler:
    from edgellm.engine.sampling import LlamaSampler  # noqa: PLC0415

    return LlamaSampler(settings, config.vocab, config.vocabulary or config.shard)


def _stub(config: StageConfig) -> StageEngine:
    from edgellm.engine.stub import StubEngine  # noqa: PLC0415

    return StubEngine(config)


def _stub_sampler(settings: SamplerSettings, config: StageConfig) -> Sampler:
    from edgellm.engine.stub import StubSampler  # noqa: PLC0415

    refuse_grammar(settings)
    return StubSampler()


def _onnx(config: StageConfig) -> StageEngine:
    from edgellm.engine.onnx import OnnxEngine  # noqa: PLC0415 - loads native code

    return OnnxEngine(config)


def _plain_sampler(settings: SamplerSettings, config: StageConfig) -> Sampler:
    """Not llama.cpp's: it need not be there, and all devices should draw the same."""
    from edgellm.engine.plainsampling import PlainSampler  # noqa: PLC0415

    refuse_grammar(settings)
    return PlainSampler(settings, config.vocab)


CLOSE_KIND = kind_of(CloseSequence)
START_KIND = kind_of(StartEngine)
POLL_S = 0.05
"""Longest active wait for the next step of a sequence: a token's round through slow stages."""

ENGINES: EngineTable = {
    "llama": (_llama, _llama_sampler),
    "onnx": (_onnx, _plain_sampler),
    "stub": (_stub, _stub_sampler),
}


READ_AHEAD_BYTES = 16 << 20
READ_AHEAD_FRAMES = 256
"""When this much waits, nothing more is read ahead: the rest waits in the node, which counts it."""


class Serving(Protocol):
    """What ``serve`` asks of a server: ``StageServer``."""

    @property
    def expects_work(self) -> bool: ...
    def handle(self, message: Message) -> Iterator[Message]: ...
    def refuse(self, frame: Frame, error: EdgeError) -> Iterator[Message]: ...


class Pipe(Protocol):
    """What ``serve`` asks of the pipe to the node: ``childside.Channel``."""

    def read(self) -> bytes: ...
    def has_input(self) -> bool: ...
    def poll(self, seconds: float) -> None: ...
    def write(self, buffers: Iterable[Buffer]) -> None: ...


def serve(channel: Pipe, server: Serving) -> None:
    """Answer messages in their order until the node closes the pipe.

    But for one thing: the end of a sequence counts at once, so that the chunks of a cancelled
    prompt that wait here are dropped rather than computed.
    """
    decoder = FrameDecoder(DEFAULT_PAYLOAD_LIMITS)
    # The node has checked sizes against the plan; what comes through this pipe is its word.
    decoder.set_payload_limit(kind_of(Hidden), MAX_PAYLOAD_BYTES)
    decoder.set_payload_limit(kind_of(KvPage), MAX_PAGE_BYTES)
    waiting: deque[Frame] = deque()
    while True:
        while not waiting:
            if server.expects_work:
                channel.poll(POLL_S)
            data = channel.read()
            if not data:
                return
            waiting.extend(decoder.feed(data))
        frame = waiting.popleft()
        try:
            message = decode(frame, LOCAL_KINDS)
        except EdgeError as error:
            answers = server.refuse(frame, error)
        else:
            if isinstance(message, Step | Hidden):
                if message.rows[0].count > 1 and not _read_ahead(channel, decoder, waiting):
                    return
                if waiting:
                    _close_ahead(server, message.rows, waiting)
            answers = server.handle(message)
        for answer in answers:
            channel.write(encode(answer))
        if frame.kind == START_KIND:
            gc.freeze()  # what is loaded stays: no collection need look at it again


def _read_ahead(channel: Pipe, decoder: FrameDecoder, waiting: deque[Frame]) -> bool:
    """Read what is there, without waiting for more. False at the end of the pipe.

    Only before chunks of a prompt: a step of one token computes too little to be worth it.
    """
    ahead = sum(len(frame.raw) for frame in waiting)
    while ahead < READ_AHEAD_BYTES and len(waiting) < READ_AHEAD_FRAMES:
        if not channel.has_input():
            break
        data = channel.read()
        if not data:
            return False
        ahead += len(data)
        waiting.extend(decoder.feed(data))
    return True


def _close_ahead(server: Serving, rows: tuple[Row, ...], waiting: Iterable[Frame]) -> None:
    """Close the sequences of ``rows`` whose end waits behind them; a second close is harmless."""
    sequences = {row.sequence for row in rows}
    for frame in waiting:
        if frame.kind == CLOSE_KIND:
            message = decode(frame, LOCAL_KINDS)
            if isinstance(message, CloseSequence) and message.sequence in sequences:
                for _ in server.handle(message):
                    pass  # it has no answer


def main() -> None:
    """Serve until the node closes the pipe."""
    serve(open_channel(), StageServer(ENGINES))


if __name__ == "__main__":
    main()
