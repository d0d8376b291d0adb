"""Digests of tensors: right, kept, and computed anew whenever the file may have changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from edgellm.errors import DeviceError, ModelFileError, UsageError
from edgellm.modelfile import Model, open_model
from edgellm.modelfile.manifest import PIECE_BYTES, TensorDigest
from edgellm.store.digests import TensorDigests
from tests.tensors import write_wide_model
from tests.unit.test_gguf_split import split


@pytest.fixture
def model(tmp_path: Path) -> Model:
    model = write_wide_model(tmp_path / "wide.gguf")
    settle(model)
    return model


@pytest.fixture
def store(tmp_path: Path) -> TensorDigests:
    return TensorDigests(tmp_path / "digests")


def settle(model: Model, seconds: float = 3600.0) -> None:
    """As if it had been written a while ago."""
    then = time.time() - seconds
    for path in model.paths:
        os.utime(path, (then, then))


def plainly(data: bytes) -> TensorDigest:
    pieces = [data[begin : begin + PIECE_BYTES] for begin in range(0, len(data), PIECE_BYTES)]
    return TensorDigest(len(data), b"".join(hashlib.sha256(piece).digest() for piece in pieces))


class Hashed:
    """Counts the bytes that are read to be hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self._lock = threading.Lock()
        pread = os.pread

        def counted(descriptor: int, length: int, offset: int) -> bytes:
            with self._lock:
                self.nbytes += length
            return pread(descriptor, length, offset)

        monkeypatch.setattr(os, "pread", counted)

    def take(self) -> int:
        taken, self.nbytes = self.nbytes, 0
        return taken


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    return Hashed(monkeypatch)


def size_of(model: Model, *names: str) -> int:
    return sum(model.tensor(name).info.nbytes for name in names)


def test_digests_are_those_of_the_bytes(model: Model, store: TensorDigests) -> None:
    found = store.of(model, model.tensors)
    assert list(found) == list(model.tensors)
    assert any(tensor.count > 3 for tensor in found.values())
    for name, tensor in found.items():
        assert tensor == plainly(model.read(name))


def test_only_what_is_asked_for_and_only_once(
    model: Model, store: TensorDigests, hashed: Hashed, tmp_path: Path
) -> None:
    few = ("output.weight", "blk.0.ffn_up.weight")
    first = store.of(model, [*few, *few])
    assert hashed.take() == size_of(model, *few)
    more = TensorDigests(tmp_path / "digests").of(model, model.tensors)  # another process
    assert hashed.take() == size_of(model, *model.tensors) - size_of(model, *few)
    assert {name: more[name] for name in few} == first
    assert store.of(model, model.tensors) == more
    assert hashed.take() == 0


def test_progress(model: Model, store: TensorDigests) -> None:
    seen: list[tuple[int, int]] = []
    few = ("output.weight", "blk.0.ffn_up.weight")
    store.of(model, few, lambda *told: seen.append(told))
    total = size_of(model, *few)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) >= 2
    seen.clear()
    every = size_of(model, *model.tensors)
    store.of(model, model.tensors, lambda *told: seen.append(told))
    assert min(seen)[0] > total  # what is known counts at once
    assert seen[-1] == (every, every)
    seen.clear()
    store.of(model, few, lambda *told: seen.append(told))
    assert seen == [(total, total)]


def change_bytes(model: Model) -> None:
    with model.paths[0].open("r+b") as file:
        file.seek(model.tensor("output.weight").info.offset + 9)
        file.write(b"!")


def test_a_changed_file_is_hashed_again(model: Model, store: TensorDigests, hashed: Hashed) -> None:
    before = store.of(model, ["output.weight"])["output.weight"]
    change_bytes(model)
    settle(model, 60)
    hashed.take()
    after = store.of(open_model(model.paths[0]), ["output.weight"])["output.weight"]
    assert hashed.take()
    assert after != before
    assert after == plainly(model.read("output.weight"))


def test_another_file_at_the_same_place(
    model: Model, store: TensorDigests, tmp_path: Path, hashed: Hashed
) -> None:
    """Same size, same time, another inode."""
    before = store.of(model, ["output.weight"])
    status = model.paths[0].stat()
    other = tmp_path / "other.gguf"
    other.write_bytes(model.paths[0].read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    hashed.take()
    other.replace(model.paths[0])
    assert store.of(model, ["output.weight"]) == before
    assert hashed.take() == size_of(model, "output.weight")


def test_split_files(tmp_path: Path, hashed: Hashed) -> None:
    whole = write_wide_model(tmp_path / "wide.gguf")
    parts = open_model(split(whole.paths[0], tmp_path)[1])
    settle(parts)
    store = TensorDigests(tmp_path / "digests")
    found = store.of(parts, parts.tensors)
    assert found == TensorDigests(tmp_path / "other").of(whole, whole.tensors)
    hashed.take()
    assert store.of(parts, parts.tensors) == found
    assert hashed.take() == 0
    then = time.time() - 100
    os.utime(parts.paths[2], (then, then))  # a change of any part counts
    store.of(parts, ["token_embd.weight"])
    assert hashed.take()


def test_links_are_followed(
    model: Model, store: TensorDigests, tmp_path: Path, hashed: Hashed
) -> None:
    store.of(model, ["output.weight"])
    link = tmp_path / "link.gguf"
    link.symlink_to(model.paths[0])
    hashed.take()
    store.of(open_model(link), ["output.weight"])
    assert hashed.take() == 0


def test_a_file_written_just_now_is_not_kept(
    model: Model, store: TensorDigests, hashed: Hashed
) -> None:
    """It may change again within one tick of the file system's clock, and nothing would show."""
    settle(model, 0.0)
    store.of(model, ["output.weight"])
    hashed.take()
    change_bytes(model)
    assert store.of(model, ["output.weight"])["output.weight"] == plainly(
        model.read("output.weight")
    )
    assert hashed.take()


def test_a_file_that_changes_meanwhile(
    model: Model, store: TensorDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread

    def slow(descriptor: int, length: int, offset: int) -> bytes:
        settle(model, 10)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", slow)
    with pytest.raises(ModelFileError, match="changed while"):
        store.of(model, ["output.weight"])


def test_a_file_that_shrinks(model: Model, store: TensorDigests) -> None:
    os.truncate(model.paths[0], model.file_bytes // 2)
    with pytest.raises(ModelFileError, match="shorter"):
        store.of(model, model.tensors)


def test_a_file_that_is_gone(model: Model, store: TensorDigests) -> None:
    model.paths[0].unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        store.of(model, ["output.weight"])


def test_an_unknown_tensor(model: Model, store: TensorDigests) -> None:
    with pytest.raises(ModelFileError, match="missing"):
        store.of(model, ["nothing"])


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "json", "swap"])
def test_a_damaged_file_of_digests_is_not_believed(
    damage: str, model: Model, store: TensorDigests, hashed: Hashed, tmp_path: Path
) -> None:
    before = store.of(model, ["output.weight"])
    (path,) = (tmp_path / "digests").iterdir()
    data = bytearray(path.read_bytes())
    match damage:
        case "cut":
            data = data[:-7]
        case "flip":  # a hash digit: the file would still be valid JSON
            at = data.rindex(before["output.weight"].pieces.hex().encode()) + 3
            data[at] = ord("0") if data[at] != ord("0") else ord("1")
        case "empty":
            data.clear()
        case "json":
            told = b'{"format": 1}'
            data = bytearray(hashlib.sha256(told).hexdigest().encode() + b"\n" + told)
        case _:  # of another model
            body = bytes(data).partition(b"\n")[2].replace(model.digest.encode(), b"0" * 64)
            data = bytearray(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    path.write_bytes(data)
    hashed.take()
    assert store.of(model, ["output.weight"]) == before
    assert hashed.take() == size_of(model, "output.weight")
    assert store.of(model, ["output.weight"]) == before
    assert hashed.take() == 0


def test_giving_up(model: Model, store: TensorDigests, tmp_path: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(DeviceError, match="given up"):
        store.of(model, model.tensors, cancel=cancel)
    assert not (tmp_path / "digests").exists()


def test_a_folder_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeviceError, match="cannot be kept"):
        TensorDigests(tmp_path / "file" / "digests").of(model, ["output.weight"])
