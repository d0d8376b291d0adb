"""Digests of a model's tensors, computed once and kept on disk.

Blocking. A kept digest counts for a file as it was when it was computed: same path, size, time of
change, inode and header. Whatever is wrong with a kept file, the digests are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgellm.errors import ModelFileError, UsageError
from edgellm.modelfile.manifest import PIECE_BYTES, TensorDigest, piece_count
from edgellm.modelfile.model import Model
from edgellm.modelfile.writer import write_atomically
from edgellm.store.disk import Progress, check_cancelled, disk_errors, in_threads, read_at, reading

FORMAT = 1
MAX_KEPT_BYTES = 256 << 20
SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within one tick of its clock, unseen."""

_BLOCK_PIECES = 16
"""Pieces that one thread reads and hashes in one go."""


class TensorDigests:
    """The digests of any models' tensors, kept in ``folder``. Safe for several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def of(
        self,
        model: Model,
        names: Iterable[str],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> dict[str, TensorDigest]:
        """The digests of the tensors ``names``; only those are read, and each only once.

        ``progress`` counts the bytes of all of them. Raises ``ModelFileError`` for a tensor that
        is not there and for a file that changes meanwhile, ``UsageError`` for one that cannot be
        read, ``DeviceError`` once ``cancel`` is set or when the result cannot be kept.
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            model.tensor(name)
        with self._lock:
            identity = _identity(model)
            kept = self._kept(model, identity)
            missing = [name for name in wanted if name not in kept]
            if missing:
                total = sum(model.tensor(name).info.nbytes for name in wanted)
                known = total - sum(model.tensor(name).info.nbytes for name in missing)
                kept |= _hash_tensors(model, missing, _Count(progress, known, total), cancel)
                if _identity(model) != identity:
                    raise ModelFileError(f"{model.paths[0]} changed while it was read.")
                self._keep(identity, kept)
            elif progress is not None:
                total = sum(kept[name].nbytes for name in wanted)
                progress(total, total)
        return {name: kept[name] for name in wanted}

    # --- what is kept -----------------------------------------------------------------

    def _path(self, identity: list[Any]) -> Path:
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return self._folder / f"{name}.json"

    def _kept(self, model: Model, identity: list[Any]) -> dict[str, TensorDigest]:
        path = self._path(identity)
        try:
            if path.stat().st_size > MAX_KEPT_BYTES:
                return {}
            check, _, body = path.read_bytes().partition(b"\n")
            if check != hashlib.sha256(body).hexdigest().encode():
                return {}
            told = json.loads(body)
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            return {}
        if told.get("identity") != identity or not isinstance(told.get("tensors"), dict):
            return {}
        found = {}
        for name, hashes in told["tensors"].items():
            source = model.tensors.get(name)
            if source is None or not isinstance(hashes, str):
                return {}
            try:
                found[name] = TensorDigest(source.info.nbytes, bytes.fromhex(hashes))
            except (ValueError, ModelFileError):
                return {}
        return found

    def _keep(self, identity: list[Any], digests: dict[str, TensorDigest]) -> None:
        if any(time.time_ns() - changed_ns < SETTLED_NS for _, _, changed_ns, _ in identity[1:]):
            return
        told = {
            "format": FORMAT,
            "identity": identity,
            "tensors": {name: digest.pieces.hex() for name, digest in digests.items()},
        }
        body = json.dumps(told).encode()
        with disk_errors("the digests of a model cannot be kept", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check = hashlib.sha256(body).hexdigest().encode()
        write_atomically(self._path(identity), (check, b"\n", body))


def _identity(model: Model) -> list[Any]:
    """What tells this state of these files from any other."""
    found: list[Any] = [model.digest]
    for path in model.paths:
        try:
            real = path.resolve(strict=True)
            status = real.stat()
        except OSError as error:
            raise UsageError(f"model file {path} cannot be read: {error.strerror}.") from error
        # Any path is text for JSON, also one that is not UTF-8.
        name = os.fsencode(real).hex()
        found.append([name, status.st_size, status.st_mtime_ns, status.st_ino])
    return found


class _Count:
    """Bytes done, told from several threads."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self._progress = progress
        self._done = done
        self._total = total
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _hash_tensors(
    model: Model, names: list[str], count: _Count, cancel: threading.Event | None
) -> dict[str, TensorDigest]:
    blocks = [
        (name, first)
        for name in names
        for first in range(0, piece_count(model.tensor(name).info.nbytes), _BLOCK_PIECES)
    ]

    def hash_block(block: tuple[str, int]) -> bytes:
        check_cancelled(cancel)
        name, first = block
        source = model.tensor(name)
        begin = first * PIECE_BYTES
        end = min(source.info.nbytes, begin + _BLOCK_PIECES * PIECE_BYTES)
        hashes = bytearray()
        try:
            with reading(source.path) as descriptor:
                for offset in range(begin, end, PIECE_BYTES):
                    length = min(PIECE_BYTES, end - offset)
                    data = read_at(descriptor, length, source.info.offset + offset)
                    if len(data) != length:
                        what = f"{source.path} became shorter while it was read."
                        raise ModelFileError(what, field=name)
                    hashes += hashlib.sha256(data).digest()
        except OSError as error:
            reason = error.strerror
            raise UsageError(f"model file {source.path} cannot be read: {reason}.") from error
        count.add(end - begin)
        return bytes(hashes)

    hashes = {name: bytearray() for name in names}
    for (name, _), block in zip(blocks, in_threads(hash_block, blocks), strict=True):
        hashes[name] += block
    return {
        name: TensorDigest(model.tensor(name).info.nbytes, bytes(joined))
        for name, joined in hashes.items()
    }
