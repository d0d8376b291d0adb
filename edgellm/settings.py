"""What the environment says, read once at the edge and handed down as values.

This file may import only ``errors`` and ``types``. Besides this, the command line reads the twins
of its options, and a child process what its parent left it there; nothing else looks.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import UsageError

LOOPBACK = "127.0.0.1"
_NAME = re.compile(r"[^\s:,]{1,64}")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One node's own choices, from its command line."""

    name: str
    home: Path
    """Holds the node's identity and shards; two homes on one machine are two devices."""
    listen: str = LOOPBACK
    port: int = 0
    """0 lets the system choose."""
    memory_bytes: int = 0
    """Most memory this device offers; 0: what is available."""
    threads: int = 0
    """Threads of a stage on this device; 0: one a core."""
    pin: tuple[int, ...] = ()
    """Processors that stages of this device are pinned to; empty: not pinned."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not self.name.isprintable():
            raise UsageError(
                f"{self.name[:80]!r} cannot be a device's name.",
                hint="Use 1 to 64 characters without spaces, colons and commas.",
            )
        if not _is_loopback(self.listen):
            raise UsageError(
                f"a node cannot listen on {self.listen} yet: there is no pairing, no encryption.",
                hint=f"Leave --listen out, or use {LOOPBACK} or ::1.",
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_home() -> Path:
    """EDGELLM_HOME, or the platform's place for an application's data."""
    told = os.environ.get("EDGELLM_HOME")
    if told:
        return Path(told).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "edgellm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "edgellm"
    return Path(os.environ.get("XDG_DATA_HOME", str(Path.home() / ".local" / "share"))) / "edgellm"
