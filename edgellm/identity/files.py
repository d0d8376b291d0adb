"""Small private files of the home folder: read whole, replaced whole, written by one at a time.

May import only ``errors``. Blocking, but quick. Whatever goes wrong is a DeviceError that names
the file and says what to do.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edgellm.errors import DeviceError

LOCK_FILE = "lock"
_LOCK_WAIT_S = 5.0
_LOCK_POLL_S = 0.01
_OTHERS_READ = 0o044
_OTHERS_WRITE = 0o022


def private_folder(folder: Path) -> None:
    """Make the folder (0700), and close it to others if it was open."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if sys.platform != "win32" and stat.S_IMODE(folder.stat().st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise unusable(folder, error) from error


def read_private(path: Path, limit: int, *, secret: bool = False) -> bytes | None:
    """The file's bytes; None where there is none.

    Raises DeviceError if it has more than ``limit`` bytes, or others may write it, or (``secret``)
    read it: what is in it may then be known or made by others, which no chmod undoes.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(path, error) from error
    forbidden = _OTHERS_WRITE | (_OTHERS_READ if secret else 0)
    if sys.platform != "win32" and mode & forbidden:
        verb = "read" if mode & forbidden & _OTHERS_READ else "change"
        raise DeviceError(
            f"{path} is open to other users (mode {mode:04o}): they could {verb} it.",
            hint=f"If nobody did: chmod 600 {path}. Else remove the folder {path.parent} and pair"
            " this device again.",
        )
    if len(data) > limit:
        raise DeviceError(f"{path} is larger than {limit} bytes: it is damaged.", hint=_hint(path))
    return data


def write_private(path: Path, data: bytes) -> None:
    """Replace the file (0600): the old one or the new one is there, never half of one."""
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(aside).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(aside).unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise unusable(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make a replaced name survive a loss of power, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time among the processes of a home; waits up to 5 s, then DeviceError.

    Each ``with`` opens the lock file anew, so it also excludes other threads; never nest it.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(path, error) from error
    try:
        _wait_for(descriptor, path)
        yield
    finally:
        os.close(descriptor)  # which also lets go of the lock; so does a process that dies


def _wait_for(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        return  # no flock; replacing whole files keeps them readable, the last writer wins
    import fcntl  # noqa: PLC0415 - POSIX only

    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise DeviceError(
                    f"another process has held {path} for {_LOCK_WAIT_S:g} s.",
                    hint="End the edgellm that hangs, then try again.",
                ) from None
            time.sleep(_LOCK_POLL_S)
        except OSError as error:
            raise unusable(path, error) from error


def unusable(path: Path, error: OSError) -> DeviceError:
    return DeviceError(
        f"{path} cannot be used: {error.strerror or error}.",
        hint="Name another home folder with --home or EDGELLM_HOME.",
    )


def _hint(path: Path) -> str:
    return f"Remove the folder {path.parent} and pair this device again."
