"""What a device offers to plans: its memory, processors and engines, and how fast it is."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

from edgellm.probe import DeviceFigures, device_figures
from edgellm.settings import NodeSettings
from edgellm.wire.messages import DeviceInfo

MEASURING = "measuring"
"""Among a device's figures while it is finding them out."""
_DISK_SHARE = 2
"""Without a limit of its own a cache takes one half of what is free and its own."""


class Offer:
    """Of one node."""

    def __init__(
        self,
        settings: NodeSettings,
        device_id: str,
        software: str,
        on_notice: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._device_id = device_id
        self._software = software
        self._on_notice = on_notice
        self._figures: dict[str, int | float] = {}
        self._measuring: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Find out how fast this device is, if it is to be known."""
        if self._settings.probe is not None:
            self._figures = {MEASURING: 1}
            self._measuring = asyncio.create_task(self._measure(self._settings.probe))

    async def close(self) -> None:
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)

    async def _measure(self, folder: Path) -> None:
        """Known from before, or measured now, for seconds."""
        threads = self._settings.threads or os.cpu_count() or 1
        found = await device_figures(folder, threads=threads, pin=self._settings.pin)
        self._figures = {}
        if found.figures is None:
            self._on_notice(f"This device's speed is not known: {found.reason}")
        else:
            self._figures = dict(found.figures.to_plain())

    @property
    def plain_weights(self) -> bool:
        """Whether stages were measured to compute faster here with weights as they are."""
        return DeviceFigures.from_plain(self._figures).plain_weights

    def describe(self) -> DeviceInfo:
        """What this device offers now."""
        free = psutil.virtual_memory().available
        within = _cgroup_free()
        if within is not None:
            free = min(free, within)
        offered = self._settings.memory_bytes or free
        engines = ["stub"]
        if importlib.util.find_spec("llama_cpp") is not None:
            engines.append("llama")
        if importlib.util.find_spec("onnxruntime") is not None:
            engines.append("onnx")
        return DeviceInfo(
            name=self._settings.name,
            device_id=self._device_id,
            memory_total=offered,
            memory_free=min(offered, free),
            cores=self._settings.threads or os.cpu_count() or 1,
            software=self._software,
            engines=tuple(engines),
            figures=self._figures,
        )


def disk_for(home: Path) -> int:
    """Bytes that the cache of a node may take, where nobody said how many."""
    own = sum(path.stat().st_size for path in (home / "cache").rglob("*") if path.is_file())
    return (shutil.disk_usage(home).free + own) // _DISK_SHARE


def _cgroup_free() -> int | None:
    """Bytes that the control group (a container) still allows, None where it sets no limit."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "memory.max").read_text(encoding="ascii"))
        return max(0, most - int((folder / "memory.current").read_text(encoding="ascii")))
    return None
