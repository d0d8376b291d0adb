"""A node's home folder belongs to one node at a time.

Blocking, but quick. The lock goes with the process, however it ends; the address of the node that
holds it stands in the file, so that a second command on the same device finds the first.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from edgellm.errors import DeviceError

_LIMIT = 200


class HomeBusyError(DeviceError):
    """Another node runs with this home. ``address`` is its ``HOST:PORT``, or empty."""

    code = "home_busy"

    def __init__(self, home: Path, address: str) -> None:
        where = f" at {address}" if address else ""
        super().__init__(
            f"another node with the home folder {home} is running{where}.",
            hint="Give this one a folder of its own with --home.",
        )
        self.address = address


class HomeLock:
    """Held from ``acquire`` to ``release``."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises HomeBusyError when another process has it. Where the system has no such locks
        (Windows) two nodes must be kept apart by hand."""
        descriptor = os.open(self._home / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor)
        except OSError as error:
            told = os.pread(descriptor, _LIMIT, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise HomeBusyError(self._home, told if told.isprintable() else "") from error
        self._descriptor = descriptor

    def tell(self, address: str) -> None:
        """Leave word where this node listens."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, address.encode("ascii", "replace"), 0)

    def release(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        import fcntl  # noqa: PLC0415 - POSIX only

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
