"""A manifest's invariant: read it, or raise ModelFileError; nothing else, soon, in little memory.

What was read is the same bytes when it is written again: no two encodings of one manifest.
"""

from __future__ import annotations

import random
import struct
import time

import pytest

from edgellm.errors import ModelFileError
from edgellm.modelfile.manifest import (
    HASH_BYTES,
    MAX_MANIFEST_BYTES,
    ManifestPart,
    ShardManifest,
    TensorDigest,
)
from tests.fuzz.driver import EXTREMES
from tests.fuzz.targets import tiny_manifest

SECONDS = 0.5
MUTATIONS = 3000


def check(data: bytes) -> bool:
    """Whether it was read."""
    began = time.process_time()
    try:
        manifest = ShardManifest.decode(data)
    except ModelFileError as error:
        assert error.field
        return False
    finally:
        assert time.process_time() - began < SECONDS
    assert manifest.encode() == data
    return True


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_manifest(tmp_path_factory.mktemp("fuzz"))


def test_cut_at_every_byte(original: bytes) -> None:
    assert check(original)
    for size in range(len(original)):
        assert not check(original[:size]), size
    assert not check(original + b"\x00")


def test_mutations(original: bytes) -> None:
    source = random.Random(1)
    read = 0
    for _ in range(MUTATIONS):
        data = bytearray(original)
        for _ in range(source.randrange(1, 4)):
            at = source.randrange(len(data) - 8)
            match source.randrange(4):
                case 0:
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    data[at : at + 8] = struct.pack("<Q", source.choice(EXTREMES))
                case 2:
                    del data[at : at + source.randrange(1, 64)]
                case _:
                    data[at:at] = source.randbytes(source.randrange(1, 64))
        read += check(bytes(data))
    assert 0 < read < MUTATIONS  # bits of hashes and of the header's text change nothing else


def test_mutations_of_the_head(original: bytes) -> None:
    for at in range(16):
        for value in range(256):
            data = bytearray(original)
            data[at] = value
            assert check(bytes(data)) == (value == original[at])


def test_random_bytes() -> None:
    source = random.Random(2)
    for _ in range(2000):
        assert not check(b"EDGEMAN1" + source.randbytes(source.randrange(200)))


def test_huge_claims() -> None:
    """A number in a few bytes never makes us allocate or loop."""
    part = struct.pack("<BQ", 0, (1 << 42))
    header = b"GGUF" + bytes(28)
    assert not check(struct.pack("<8sII", b"EDGEMAN1", 32, 1) + header + part)
    assert not check(struct.pack("<8sII", b"EDGEMAN1", 0xFFFFFFFF, 1) + header)
    assert not check(struct.pack("<8sII", b"EDGEMAN1", 32, 0xFFFFFFFF) + header)
    assert not check(bytes(MAX_MANIFEST_BYTES + 1))
    fills = struct.pack("<BQB", 1, 1 << 42, 1) + b"\x00"
    assert not check(struct.pack("<8sII", b"EDGEMAN1", 32, 2) + header + fills * 2)


def test_a_manifest_that_is_too_large_is_not_made() -> None:
    pieces = MAX_MANIFEST_BYTES // HASH_BYTES
    part = ManifestPart(pieces << 19, TensorDigest(pieces << 19, bytes(HASH_BYTES) * pieces))
    with pytest.raises(ModelFileError, match="limit"):
        ShardManifest(b"GGUF" + bytes(60), (part,))
