"""The reader's invariant: read a model and describe it, or refuse it with a typed error, fast.

Nothing else may come out: no other exception, no long wait, no large allocation. The same goes
for the card and the recipes, which trust what the reader let through.
"""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from edgellm.errors import EdgeError, ModelFileError, UsageError
from edgellm.modelfile import read_header
from tests.fuzz.driver import EXTREMES
from tests.fuzz.targets import use_gguf
from tests.tinymodels import write_tiny_model

MUTATIONS = 700
"""Of each of three models: 2,100 in all."""
SECONDS = 1.0
"""Longest that one hostile file may keep the reader busy."""


@pytest.fixture(scope="module", params=["llama", "gemma2", "lfm2"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid tiny model, as bytes."""
    path = write_tiny_model(request.param, tmp_path_factory.mktemp("fuzz"))
    return path.read_bytes()


def header_end(data: bytes, path: Path) -> int:
    path.write_bytes(data)
    return read_header(path).data_offset


def check(path: Path) -> EdgeError | None:
    """Read the file; returns the typed error, lets anything else fail the test."""
    began = time.process_time()
    try:
        use_gguf(path)
    except EdgeError as error:
        return error
    finally:
        assert time.process_time() - began < SECONDS
    return None


def test_cut_at_every_header_byte(tmp_path: Path) -> None:
    path = write_tiny_model("llama", tmp_path)
    end = read_header(path).data_offset
    # In place, from the end: truncating is far cheaper than writing every prefix anew.
    with path.open("r+b") as file:
        for size in range(end, -1, -1):
            file.truncate(size)
            began = time.process_time()
            with pytest.raises(ModelFileError) as caught:
                read_header(path)
            assert caught.value.field, size
            assert caught.value.exit_code == 5
            assert time.process_time() - began < SECONDS


def test_mutations(original: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mutated.gguf"
    end = header_end(original, path)
    generator = random.Random(20240917)
    refused = 0
    for _ in range(MUTATIONS):
        data = bytearray(original[:end])
        for _ in range(generator.choice((1, 1, 1, 2, 8))):
            mutate(data, end, generator)
        rewrite(path, data)
        error = check(path)
        if error is not None:
            assert isinstance(error, (ModelFileError, UsageError)), error
            refused += 1
    # Most mutations hit names or vocabulary and are harmless; but a reader that never refuses
    # anything would pass everything above.
    assert refused > MUTATIONS // 20


def rewrite(path: Path, header: bytes | bytearray) -> None:
    """Replace the file's first bytes; the tensor data behind them stays."""
    with path.open("r+b") as file:
        file.write(header)


def mutate(data: bytearray, end: int, generator: random.Random) -> None:
    """One change within the header: a byte, a bit, an extreme number, or a moved piece."""
    at = generator.randrange(4, end - 8)
    kind = generator.randrange(5)
    if kind == 0:
        data[at] = generator.randrange(256)
    elif kind == 1:
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 2:
        struct.pack_into("<Q", data, at, generator.choice(EXTREMES))
    elif kind == 3:
        struct.pack_into("<I", data, at, generator.choice(EXTREMES) & 0xFFFFFFFF)
    else:
        source = generator.randrange(4, end - 8)
        data[at : at + 8] = data[source : source + 8]


def test_numbers_that_the_loader_uses(original: bytes, tmp_path: Path) -> None:
    """Every integer of the architecture's own metadata, set to every extreme."""
    path = tmp_path / "numbers.gguf"
    end = header_end(original, path)
    header = read_header(path)
    architecture = header.metadata["general.architecture"].scalar()
    for key, value in header.metadata.items():
        if not key.startswith(f"{architecture}.") or len(value.raw) != 4:
            continue
        at = original.index(key.encode() + struct.pack("<I", value.type)) + len(key) + 4
        for extreme in EXTREMES:
            data = bytearray(original[:end])
            struct.pack_into("<I", data, at, extreme & 0xFFFFFFFF)
            rewrite(path, data)
            error = check(path)
            assert error is None or isinstance(error, (ModelFileError, UsageError)), (key, error)
