"""Small acts on this disk that may fail: exact reads and writes, room for a file, hashing.

Blocking. What the disk refuses becomes a ``DeviceError`` that says what to do about it.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from edgellm.errors import DeviceError

Progress = Callable[[int, int], None]
"""Told ``(bytes done, bytes in all)``, in the thread that works."""

HASH_THREADS = max(1, min(2, os.cpu_count() or 1))
"""Two threads hash faster than most disks read; more would only take the processors of others."""

_CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
_DIGEST = re.compile("[0-9a-f]{64}")
_NO_PREALLOCATION = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_digest(text: str) -> bool:
    """Whether ``text`` is a SHA-256 as 64 lower-case hex digits: safe as a file's name."""
    return _DIGEST.fullmatch(text) is not None


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` within into a ``DeviceError``: ``what`` could not be done."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        hint = (
            f"Free some space on the disk of {folder}, or use a home folder on another one."
            if full
            else f"Check that {folder} can be written, and its disk."
        )
        raise DeviceError(f"{what}: {reason}.", hint=hint) from error


def check_cancelled(cancel: threading.Event | None) -> None:
    """Raise ``DeviceError`` once ``cancel`` is set."""
    if cancel is not None and cancel.is_set():
        raise DeviceError("the load was given up.")


def open_for_reading(path: Path) -> int:
    """A descriptor; raises ``OSError``."""
    return os.open(path, os.O_RDONLY | _CLOEXEC)


def open_for_writing(path: Path) -> int:
    """A descriptor of a file that only its owner may read, made if it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | _CLOEXEC, 0o600)


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A descriptor to read from, closed at the end; raises ``OSError``."""
    descriptor = open_for_reading(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Up to ``length`` bytes: fewer only at the end of the file."""
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """All of ``data``: a nearly full disk takes a part of it before it says so."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def reserve(descriptor: int, nbytes: int) -> None:
    """Make the file ``nbytes`` long and have the disk keep room for all of it, where it can.

    What is in the file stays. A full disk says so here, before anything is fetched.
    """
    os.ftruncate(descriptor, nbytes)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``work`` of every item, in order, by ``HASH_THREADS`` threads (hashing frees the GIL).

    The first error ends it: no further item is begun.
    """
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="edgellm-hash") as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)
