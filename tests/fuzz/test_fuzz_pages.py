"""KV pages from a hostile peer: refused, or exactly what was expected; nothing else, soon.

Two parsers: a stage that takes pages, and the reader of what llama.cpp wrote. Pages reach an engine
only when every one of them was the right one for its place; what the fuzzer may change is their
numbers, and those are finite.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm.engine.base import StageConfig
from edgellm.engine.pages import Cache, Image, Layout, Recurrent, Tensor
from edgellm.engine.server import StageServer, stage_config_to
from edgellm.engine.stateblob import Shape, blank_image, read_image
from edgellm.engine.stub import VOCABULARY, WIDTH, StubEngine, StubSampler
from edgellm.errors import EdgeError, RemoteProtocolError, StageError
from edgellm.types import EngineSettings, LayerSpan
from edgellm.wire.care import ExpectSequence, KvPage, SequenceImported
from edgellm.wire.frames import FrameDecoder, encode_frame
from edgellm.wire.messages import LOCAL_KINDS, ErrorReport, StartEngine, decode, encode, kind_of
from edgellm.wire.tags_care import MAX_PAGE_BYTES
from tests.fuzz.driver import Target, mutated, run

COUNT = 1500
TOKENS = 150
EPOCH = 3
MODEL = "ab" * 32
SETTINGS = EngineSettings(context=160, sequences=2, chunk=64, threads=1)
CONFIG = StageConfig("llama-like", LayerSpan(2, 4), 6, WIDTH, VOCABULARY, SETTINGS, model=MODEL)
HEAD = (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
F16 = (1).to_bytes(4, "little") + (8).to_bytes(8, "little")
F32 = (0).to_bytes(4, "little") + (12).to_bytes(8, "little")
LAYOUT = Layout(
    (
        Cache(2, 0, False, HEAD, (Tensor(F16, 8, 1), Tensor(F16, 8, 1))),
        Cache(2, 10, False, HEAD, (Tensor(F16, 8, 1), Tensor(F16, 8, 1))),
    ),
    Recurrent(HEAD, (Tensor(F32, 12, 0),)),
)
SHAPE = Shape(2, True, 2, 10)


def image() -> Image:
    made = blank_image(LAYOUT, TOKENS)
    for page in made.pages:
        made.write(page, bytes([page.index + 1]) * page.nbytes)
    return made


class Guarded(StubEngine):
    """Lays its memory out as llama.cpp does, and takes only what llama.cpp may be given."""

    def blank(self, slot: int, tokens: int) -> Image:
        return blank_image(LAYOUT, tokens)

    def restore(self, slot: int, image: Image) -> None:
        again = read_image(image.data, [SHAPE], TOKENS)
        if again.layout != LAYOUT:
            raise AssertionError("headers that are not ours")
        for tensor in (0, 1):
            if not np.isfinite(image.cells(0, tensor).copy().view(np.float16)).all():
                raise AssertionError("numbers that are not finite")


# --- pages, as frames behind one another ----------------------------------------------


@functools.cache
def frames() -> tuple[bytes, ...]:
    source = image()
    made = []
    for page in source.pages:
        payload = source.read(page)
        message = KvPage(
            epoch=EPOCH,
            sequence=1,
            model=MODEL,
            first=2,
            end=4,
            kv_type="f16",
            kind=page.kind,
            position=page.position,
            count=page.count,
            index=page.index,
            pages=page.pages,
            digest=hashlib.sha256(payload).hexdigest(),
            payload=payload,
        )
        made.append(b"".join(encode(message)))
    return tuple(made)


def _decoder() -> FrameDecoder:
    return FrameDecoder({kind_of(KvPage): MAX_PAGE_BYTES})


def feed_pages(data: bytes, folder: Path) -> bool:
    """Whether the sequence was restored. Anything but an answer is a finding."""
    server = StageServer({"llama-like": (Guarded, lambda settings, size: StubSampler())})
    list(server.handle(StartEngine(stage_config_to(CONFIG, EPOCH, 1))))
    list(server.handle(ExpectSequence(EPOCH, 1, MODEL, TOKENS)))
    answers = []
    try:
        for frame in _decoder().feed(data):
            message = decode(frame, LOCAL_KINDS)
            if isinstance(message, KvPage):
                answers += list(server.handle(message))
    except RemoteProtocolError:
        return False
    if len(answers) > 1:
        raise AssertionError("more than one answer")
    if any(not isinstance(each, ErrorReport | SequenceImported) for each in answers):
        raise AssertionError("an answer of another kind")
    return bool(answers) and isinstance(answers[0], SequenceImported)


def crafted(chance: random.Random, data: bytes) -> bytes:
    """One page changed behind right checksums, and behind a right digest: a peer that means it."""
    changed = list(frames())
    at = chance.randrange(len(changed))
    (frame,) = _decoder().feed(changed[at])
    if chance.random() < 0.3:
        meta = mutated(chance, frame.meta, frame.meta)
        changed[at] = b"".join(encode_frame(frame.kind, meta, bytes(frame.payload)))
        return b"".join(changed)
    page = decode(frame)
    assert isinstance(page, KvPage)
    payload = bytes(page.payload)
    match chance.randrange(4):
        case 0:
            payload = mutated(chance, payload, payload) or b"\x00"
        case 1:
            payload = chance.randbytes(len(payload))
        case 2:
            spot = chance.randrange(len(payload))
            payload = payload[:spot] + chance.randbytes(1) + payload[spot + 1 :]
        case _:
            chance.shuffle(changed)
            return b"".join(changed)
    digest = hashlib.sha256(payload).hexdigest()
    page = dataclasses.replace(page, payload=payload, digest=digest)
    changed[at] = b"".join(encode(page))
    return b"".join(changed)


# --- blobs ------------------------------------------------------------------------------


def blobs(folder: Path) -> Sequence[bytes]:
    return [image().data.tobytes()]


def feed_blob(data: bytes, folder: Path) -> bool:
    """Whether it was read. What was read can be cut into pages and put together again."""
    try:
        read = read_image(np.frombuffer(data, np.uint8), [SHAPE], TOKENS)
        again = blank_image(read.layout, TOKENS)
    except StageError:
        return False
    for page in read.pages:
        again.write(page, read.read(page))
    try:
        again.check()
    except EdgeError:
        return False
    return read_image(again.data, [SHAPE], TOKENS).layout == read.layout


TARGETS = (
    Target("pages", lambda folder: [b"".join(frames())], feed_pages, crafted, seconds=0.5),
    Target("stateblob", blobs, feed_blob, seconds=0.5),
)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_inputs_are_valid_or_refused(target: Target, tmp_path: Path) -> None:
    tally = run(target, tmp_path, count=COUNT)
    assert 0 < tally.valid < tally.inputs == COUNT


def test_what_the_guard_watches_for_is_seen() -> None:
    """The control: without the checks the fuzzer would find something."""
    engine = Guarded(CONFIG)
    wrong = image()
    engine.restore(0, wrong)
    wrong.cells(0, 1)[3] = 0xFF
    with pytest.raises(AssertionError, match="not finite"):
        engine.restore(0, wrong)
    other = image()
    other.data[8] = 1
    with pytest.raises(StageError, match="streams"):
        engine.restore(0, other)
