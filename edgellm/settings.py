"""What the environment says, read once at the edge and handed down as values.

This file may import only ``errors`` and ``types``. Nothing else in the package reads the
environment for itself.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"


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
