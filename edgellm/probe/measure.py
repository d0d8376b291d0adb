"""Measure this machine now: start the child, ask it, compute.

It keeps nothing: the files are gone when it returns, and the child with it. What llama.cpp does to
the child, an abort included, comes back as an EdgeError with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.engine.childcall import ChildCaller
from edgellm.engine.host import stage_environment
from edgellm.errors import DeadlineError, DeviceError
from edgellm.probe.figures import DeviceFigures, Timings, better_figures
from edgellm.probe.synthetic import BARE, BlockShape, shape_for

CHILD_MODULE = "edgellm.probe.child"
FOLDER_PREFIX = "probe-"
REPACKED, PLAIN = "repacked", "plain"
CHUNK = 64
"""Tokens in a prefill call."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is spent on a probe."""

    rounds: int = 3
    steps: int = 16
    """Decode steps in a round, at most; three are always made."""
    steps_within_s: float = 0.15
    chunks: int = 3
    """Prefill calls in a round, at most; one is always made."""
    chunks_within_s: float = 0.2
    disk_bytes: int = 8 << 20
    disk_within_s: float = 4.0
    within_s: float = 16.0
    """After that, and the disk's time, it is given up."""


USUAL = Effort()


async def measure(
    folder: Path,
    *,
    threads: int,
    pin: Sequence[int] = (),
    memory_bytes: int,
    effort: Effort = USUAL,
    shape: BlockShape | None = None,
) -> DeviceFigures:
    """The figures of a stage process with ``threads`` threads, pinned to the processors ``pin``.

    ``folder`` must exist and takes the files for a moment; the disk that is measured is its disk.
    ``memory_bytes`` is what may be taken, roughly. ``shape`` overrides the block for tests.
    Raises StageError with the reason when the engine fails, DeadlineError after
    ``effort.within_s``, DeviceError when the folder takes no files.
    """
    if shape is None:
        # The file in the system's cache, two copies of it, and what the process itself needs.
        shape = shape_for(memory_bytes // 5, last_level_cache_bytes())
    try:
        with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, dir=folder) as files:
            environment = stage_environment()  # it is a stage process that is to be measured
            child = await ChildCaller.start(CHILD_MODULE, name="the probe", environment=environment)
            try:
                async with asyncio.timeout(effort.within_s):
                    repacked, plain = await _timings(
                        child, Path(files), shape, threads, pin, effort
                    )
                disk = await _disk_rate(child, Path(files), effort)
            finally:
                await child.stop()  # before its files go
    except TimeoutError as error:
        raise DeadlineError(f"the probe was given up after {effort.within_s:g} s.") from error
    except OSError as error:
        raise DeviceError(
            f"the probe has no place for its files in {folder}: {error.strerror or error}.",
            hint="Check the free space and the permissions of that folder.",
        ) from error
    return better_figures(repacked, plain, disk_bytes_per_s=disk, threads=threads, now=time.time())


async def _timings(
    child: ChildCaller,
    files: Path,
    shape: BlockShape,
    threads: int,
    pin: Sequence[int],
    effort: Effort,
) -> tuple[Timings, Timings]:
    """Of the block as llama.cpp rearranges it, and as it is in the file."""
    limit = effort.within_s
    await child.call("pin", limit, processors=list(pin))
    for name, made in (("bare", BARE), (REPACKED, shape), (PLAIN, shape)):
        await child.call(
            "load",
            limit,
            block=name,
            path=str(files / name),
            shape=[made.width, made.feed_forward, made.layers],
            threads=threads,
            chunk=CHUNK,
            plain=name == PLAIN,
        )

    async def seconds(block: str, tokens: int, least: int, most: int, within_s: float) -> None:
        answer = await child.call(
            "run",
            limit,
            block=block,
            tokens=tokens,
            warm=2 if tokens == 1 else 0,
            least=least,
            count=most,
            within_s=within_s,
        )
        taken[block, tokens].extend(answer["seconds"])

    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for block in (REPACKED, PLAIN):
        await child.call(
            "run", limit, block=block, tokens=CHUNK, warm=1, least=0, count=0, within_s=0
        )
    # In turn, so that whatever else the machine does for a moment falls on a part of each.
    for _ in range(effort.rounds):
        await seconds("bare", 1, 3, effort.steps, effort.steps_within_s)
        for block in (REPACKED, PLAIN):
            await seconds(block, 1, 3, effort.steps, effort.steps_within_s)
            await seconds(block, CHUNK, 1, effort.chunks, effort.chunks_within_s)

    def timings(block: str) -> Timings:
        return Timings(
            weight_bytes=shape.weight_bytes,
            weights=shape.weights,
            chunk=CHUNK,
            bare_steps=tuple(taken["bare", 1]),
            steps=tuple(taken[block, 1]),
            chunks=tuple(taken[block, CHUNK]),
        )

    return timings(REPACKED), timings(PLAIN)


async def _disk_rate(child: ChildCaller, files: Path, effort: Effort) -> float | None:
    """Bytes per second, or None where it cannot be told: a disk that does not answer costs its own
    figure, not the others. The last question to ``child``, which may be dead afterwards."""
    try:
        answer = await child.call(
            "disk",
            effort.disk_within_s,
            path=str(files / "disk"),
            nbytes=effort.disk_bytes,
            repeats=3,
        )
    except DeviceError:
        return None
    rates = answer["bytes_per_s"]
    return float(statistics.median(rates)) if rates else None


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first processor, 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"(\d+)([KM]?)", path.read_text(encoding="ascii").strip())
            if found:
                sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes)
