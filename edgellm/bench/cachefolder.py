"""Where benches keep what takes minutes to make. It may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def bench_cache() -> Path:
    """The folder, which need not exist yet, in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    return base / "edgellm" / "bench"
