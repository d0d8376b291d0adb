"""The memory of a sequence moves to another engine, of every kind, and goes on bit for bit.

Each comparison has a negative control: a page of other numbers must be seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgellm.engine.base import Float32, SlotRow, StageConfig, StageEngine
from edgellm.engine.pages import Image
from edgellm.errors import StageError
from edgellm.types import LayerSpan, Mode
from tests.stages import SPLITS, engine_of, layers_of, settings_of, stage_config

CONTEXT = 256
LENGTH = 150
"""Two full pages and a part of one; far beyond the sliding windows of the tiny models."""
ROLES = ("whole", "first", "middle", "last")


def config_of(kind: str, role: str, folder: Path, **changes: object) -> StageConfig:
    first, middle, last = SPLITS[kind]
    span = {"whole": (0, layers_of(kind)), "first": first, "middle": middle, "last": last}[role]
    plain = settings_of(context=CONTEXT, sequences=3, chunk=32)
    settings = dataclasses.replace(plain, **changes)  # type: ignore[arg-type]
    return stage_config(kind, span, settings, folder)


@contextmanager
def two_engines(config: StageConfig) -> Iterator[tuple[StageEngine, StageEngine]]:
    with engine_of(config) as one, engine_of(config) as other:
        yield one, other


class Feeder:
    """The same rows for everybody who asks."""

    def __init__(self, config: StageConfig) -> None:
        random = np.random.default_rng(5)
        self.config = config
        self.tokens = random.integers(3, config.vocab, 2 * CONTEXT).astype(np.int32)
        self.rows: Float32 = random.standard_normal((2 * CONTEXT, config.width), dtype=np.float32)
        if config.engine == "stub":  # its rows are whole numbers
            self.rows = random.integers(0, 2039, (2 * CONTEXT, config.width)).astype(np.float32)

    def give(self, engine: StageEngine, slot: int, begin: int, end: int) -> Float32:
        row = [SlotRow(slot, begin, end - begin, True)]
        if self.config.first:
            made = engine.decode(row, self.tokens[begin:end], None)
        else:
            made = engine.decode(row, None, self.rows[begin:end])
        values = made.logits if made.hidden is None else made.hidden
        assert values is not None
        return values.copy()

    def fill(self, engine: StageEngine, slot: int, length: int) -> None:
        for begin in range(0, length, 25):
            self.give(engine, slot, begin, min(begin + 25, length))

    def go_on(self, engine: StageEngine, slot: int, position: int, count: int = 4) -> Float32:
        steps = [self.give(engine, slot, at, at + 1) for at in range(position, position + count)]
        return np.concatenate(steps)


def pages_of(image: Image) -> list[bytes]:
    return [image.read(page) for page in image.pages]


def put(engine: StageEngine, slot: int, tokens: int, payloads: list[bytes]) -> None:
    image = engine.blank(slot, tokens)
    for page, payload in zip(image.pages, payloads, strict=True):
        image.write(page, payload)
    image.check()
    engine.restore(slot, image)


def altered(payload: bytes) -> bytes:
    """Other numbers, near the right ones: bits of the mantissas of f16 and f32."""
    mask = np.resize(np.array([0x55, 0], np.uint8), len(payload))
    return (np.frombuffer(payload, np.uint8) ^ mask).tobytes()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", list(SPLITS))
def test_a_sequence_moves_and_goes_on_bit_for_bit(kind: str, role: str, model_dir: Path) -> None:
    config = config_of(kind, role, model_dir)
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        feeder.give(here, 2, 0, 20)  # another one is resident at both ends
        feeder.give(there, 0, 0, 20)
        feeder.fill(here, 1, LENGTH)
        image = here.export(1, LENGTH)
        payloads = pages_of(image)
        assert [len(payload) for payload in payloads] == [page.nbytes for page in image.pages]
        put(there, 2, LENGTH, payloads)
        stays = feeder.go_on(here, 1, LENGTH)
        assert np.array_equal(feeder.go_on(there, 2, LENGTH), stays)
        # the neighbour at the other end felt nothing, nor did the one here
        assert np.array_equal(feeder.go_on(there, 0, 20), feeder.go_on(here, 2, 20))
        # negative controls: other numbers in any one page, and a page that is left out
        for index in range(len(payloads)):
            there.clear(2)
            wrong = [altered(p) if i == index else p for i, p in enumerate(payloads)]
            put(there, 2, LENGTH, wrong)
            assert not np.array_equal(feeder.go_on(there, 2, LENGTH), stays), index
            there.clear(2)
            empty = [bytes(len(p)) if i == index else p for i, p in enumerate(payloads)]
            put(there, 2, LENGTH, empty)
            assert not np.array_equal(feeder.go_on(there, 2, LENGTH), stays), index


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen35"])
def test_every_kind_of_cells_moves(kind: str, mode: Mode, kv_type: str, model_dir: Path) -> None:
    config = config_of(kind, "whole", model_dir, mode=mode, kv_type=kv_type)
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        feeder.fill(here, 0, LENGTH)
        payloads = pages_of(here.export(0, LENGTH))
        put(there, 0, LENGTH, payloads)
        stays = feeder.go_on(here, 0, LENGTH)
        assert np.array_equal(feeder.go_on(there, 0, LENGTH), stays)
        there.clear(0)
        put(there, 0, LENGTH, [bytes(len(payload)) for payload in payloads])
        assert not np.array_equal(feeder.go_on(there, 0, LENGTH), stays)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2"])
def test_transposed_values_move(kind: str, model_dir: Path) -> None:
    """Without flash attention llama.cpp keeps the values by columns."""
    config = config_of(kind, "whole", model_dir, flash_attention=False)
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        feeder.fill(here, 1, LENGTH)
        image = here.export(1, LENGTH)
        assert any(tensor.columns for cache in image.layout.caches for tensor in cache.tensors)
        put(there, 2, LENGTH, pages_of(image))
        assert np.array_equal(feeder.go_on(there, 2, LENGTH), feeder.go_on(here, 1, LENGTH))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_cells_that_lie_mixed_in_a_shared_cache_move(kind: str, model_dir: Path) -> None:
    """Two sequences grow in turns, so that neither has its cells in one run; one of them has its
    end cut off and grows again, into cells that were freed before."""
    config = config_of(kind, "whole", model_dir, mode=Mode.NORMAL)
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        for at in range(0, 60, 5):
            feeder.give(here, 0, at, at + 5)
            feeder.give(here, 1, at, at + 5)
        here.clear(0)
        here.truncate(1, 50)
        for at in range(50, 100, 10):
            feeder.give(here, 1, at, at + 10)
        image = here.export(1, 100)
        assert any(order is not None for order in image._orders)
        put(there, 2, 100, pages_of(image))
        assert pages_of(there.export(2, 100)) == pages_of(image)
        stays = feeder.go_on(here, 1, 100)
        # Not bit for bit: attention adds its cells up in the order in which they lie, and random
        # layers make more of it.
        assert distance(feeder.go_on(there, 2, 100), stays) < 0.03
        # negative control: cells without anything in them are nowhere near
        there.clear(2)
        put(there, 2, 100, [bytes(len(payload)) for payload in pages_of(image)])
        assert distance(feeder.go_on(there, 2, 100), stays) > 0.1


def distance(one: Float32, other: Float32) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("kind", ["stub", "llama", "gemma3", "onnx-plain", "onnx-grouped"])
def test_truncate_forgets_from_a_position_on(kind: str, model_dir: Path) -> None:
    config = config_of(kind, "whole", model_dir)
    feeder = Feeder(config)
    other = Feeder(config)
    other.tokens = other.tokens[::-1].copy()
    with engine_of(config) as engine:
        feeder.fill(engine, 0, 100)
        expected = feeder.go_on(engine, 0, 100, 20)
        engine.truncate(0, 100)
        assert np.array_equal(feeder.go_on(engine, 0, 100, 20), expected)
        engine.truncate(0, 100)
        other.give(engine, 0, 100, 120)
        engine.truncate(0, 100)
        engine.truncate(0, 300)  # nothing is there: harmless
        assert np.array_equal(feeder.go_on(engine, 0, 100, 20), expected)
        # negative control: what was before is kept, and matters
        engine.truncate(0, 99)
        other.give(engine, 0, 99, 100)
        assert not np.array_equal(feeder.go_on(engine, 0, 100, 20), expected)


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "qwen35", "onnx-conv"])
def test_recurrent_layers_cannot_go_back_and_say_so(kind: str, model_dir: Path) -> None:
    config = config_of(kind, "whole", model_dir)
    feeder = Feeder(config)
    with engine_of(config) as engine:
        feeder.fill(engine, 0, 30)
        with pytest.raises(StageError, match="cannot go back to an earlier position"):
            engine.truncate(0, 29)
        engine.truncate(0, 30)  # nothing to forget
        stays = feeder.go_on(engine, 0, 30)
        engine.clear(0)
        feeder.fill(engine, 0, 30)
        assert np.array_equal(feeder.go_on(engine, 0, 30), stays)  # and was as before


def test_a_moved_window_can_go_back_one_token_and_no_further(model_dir: Path) -> None:
    config = config_of("gemma3", "whole", model_dir)
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        feeder.fill(here, 0, LENGTH - 1)
        feeder.give(here, 0, LENGTH - 1, LENGTH)
        put(there, 0, LENGTH, pages_of(here.export(0, LENGTH)))
        expected = feeder.go_on(here, 0, LENGTH)
        for engine in (here, there):
            engine.truncate(0, LENGTH - 1)
            feeder.give(engine, 0, LENGTH - 1, LENGTH)
            assert np.array_equal(feeder.go_on(engine, 0, LENGTH), expected)
        with pytest.raises(StageError, match="sliding window before position 100"):
            there.truncate(0, 100)
        here.truncate(0, 100)  # it still has all: its cache is as long as the context


def test_a_window_that_was_not_kept_is_not_gone_back_to(model_dir: Path) -> None:
    """Its cache is 256 cells, as small as llama.cpp makes one."""
    config = config_of("gemma3", "whole", model_dir, swa_full=False, context=2 * CONTEXT)
    feeder = Feeder(config)
    with engine_of(config) as engine:
        feeder.fill(engine, 0, 2 * CONTEXT)
        with pytest.raises(StageError, match="sliding window before position 100"):
            engine.truncate(0, 100)


def test_bytes_are_those_of_the_cells(model_dir: Path) -> None:
    config = config_of("llama", "middle", model_dir)
    feeder = Feeder(config)
    with engine_of(config) as engine:
        feeder.fill(engine, 0, LENGTH)
        image = engine.export(0, LENGTH)
        # one layer, two KV heads of 32 f16 keys and values
        assert image.layout.cell_bytes == 2 * 2 * 32 * 2
        assert sum(map(len, pages_of(image))) == LENGTH * image.layout.cell_bytes
        assert [page.count for page in image.pages] == [64, 64, 22]


@pytest.mark.parametrize("kind", ["llama", "mamba", "onnx-plain", "onnx-half", "onnx-conv"])
def test_numbers_that_are_not_finite_are_refused(kind: str, model_dir: Path) -> None:
    config = config_of(kind, "whole", model_dir)
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        feeder.fill(here, 0, 40)
        payloads = pages_of(here.export(0, 40))
        for last in range(4):
            wrong = bytearray(payloads[0])
            size = 2 if kind == "llama" else 4
            at = (len(wrong) // 4 * last) // 4 * 4
            wrong[at : at + size] = b"\xff" * size
            with pytest.raises(StageError, match="not finite"):
                put(there, 0, 40, [bytes(wrong), *payloads[1:]])


def test_why_numbers_must_be_finite(model_dir: Path) -> None:
    """In a shared cache they spoil a sequence of somebody else, even after theirs was closed."""
    config = config_of("llama", "whole", model_dir, mode=Mode.NORMAL, flash_attention=False)
    feeder = Feeder(config)
    with engine_of(config) as engine:
        feeder.fill(engine, 0, 40)
        image = engine.blank(1, 40)
        for page in image.pages:
            image.write(page, b"\xff" * page.nbytes)
        engine.restore(1, image)  # unchecked, on purpose
        engine.clear(1)
        assert np.isnan(feeder.go_on(engine, 0, 40)).any()


def test_an_engine_refuses_an_image_that_its_context_has_no_room_for(model_dir: Path) -> None:
    config = config_of("llama", "whole", model_dir, context=256, sequences=1)
    larger = dataclasses.replace(
        config, settings=dataclasses.replace(config.settings, context=1024)
    )
    with engine_of(config) as here, engine_of(larger) as there:
        image = there.blank(0, 600)
        for page in image.pages:
            image.write(page, bytes(page.nbytes))
        with pytest.raises(StageError, match=r"llama\.cpp took 0 of"):
            here.restore(0, image)
        # and goes on as if nothing had been
        feeder = Feeder(config)
        feeder.fill(here, 0, 40)
        made = feeder.go_on(here, 0, 40)
        here.clear(0)
        feeder.fill(here, 0, 40)
        assert np.array_equal(feeder.go_on(here, 0, 40), made)


@pytest.mark.models
def test_a_trained_model_moves(shared_models: Path) -> None:
    """And how many bytes a token takes: 5 layers, 4 KV heads of 8, f16."""
    path = shared_models / "stories260K-f32.gguf"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the test models")
    plain = settings_of(context=CONTEXT, sequences=2, chunk=32)
    config = StageConfig("llama", LayerSpan(0, 5), 5, 64, 512, plain, shard=str(path))
    feeder = Feeder(config)
    with two_engines(config) as (here, there):
        feeder.fill(here, 0, LENGTH)
        image = here.export(0, LENGTH)
        put(there, 1, LENGTH, pages_of(image))
        assert image.layout.cell_bytes == 5 * 2 * 4 * 8 * 2
        assert np.array_equal(feeder.go_on(there, 1, LENGTH), feeder.go_on(here, 0, LENGTH))
