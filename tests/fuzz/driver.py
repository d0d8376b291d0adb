"""What all fuzz targets share: how inputs are mutated, what counts as a finding, how long to run.

Everything is derived from one seed, so that a finding repeats. A target is fed an input and says
whether it was valid; a refusal is its own typed error, which it turns into False. Any other
exception, an input that takes too long, or one that takes too much memory is a finding.
"""

from __future__ import annotations

import contextlib
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
MEASURE_EVERY = 64
"""Measuring memory makes Python ten times slower, so only some inputs are."""
PATIENCE = 3
"""Times that a slow input is tried: a busy machine is no finding."""


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    seeds: Callable[[Path], Sequence[bytes]]
    """Valid inputs; the folder is for files that have to be made first."""
    feed: Callable[[bytes, Path], bool]
    """Whether the input was valid. Files may be written below the folder."""
    craft: Callable[[random.Random, bytes], bytes] | None = None
    """A mutation that gets past checksums and lengths, where there are any."""
    seconds: float = 1.0
    memory_bytes: int = 10 << 20


@dataclass
class Tally:
    """What a run did."""

    inputs: int = 0
    valid: int = 0


class FindingError(AssertionError):
    """The input that breaks the target's promise is ``data``."""

    def __init__(self, target: Target, data: bytes, what: str) -> None:
        super().__init__(f"{target.name}: {what}; {len(data)} bytes: {data[:64].hex()}...")
        self.data = data


def mutated(chance: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """One to four changes of bytes, lengths and numbers."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(8):
            case 0:
                out[at : at + 1] = chance.randbytes(1)
            case 1 if out:
                out[at % len(out)] ^= 1 << chance.randrange(8)
            case 2:
                del out[at : at + chance.randint(1, 16)]
            case 3:
                out[at:at] = chance.randbytes(chance.randint(1, 16))
            case 4:
                out[at : at + 4] = struct.pack("<I", chance.choice(EXTREMES) & 0xFFFFFFFF)
            case 5:
                out[at : at + 8] = struct.pack("<Q", chance.choice(EXTREMES))
            case 6:
                del out[at:]
            case _:
                begin = chance.randrange(len(other) + 1)
                out[at:at] = other[begin : begin + chance.randint(1, 64)]
    return bytes(out)


def inputs(target: Target, seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Inputs without end: the valid ones first."""
    yield from seeds
    chance = random.Random(f"{target.name} {seed}")
    while True:
        data, other = chance.choice(seeds), chance.choice(seeds)
        kind = chance.randrange(10)
        if kind == 0:
            yield chance.randbytes(chance.randrange(256))
        elif target.craft is not None and kind < 6:
            yield target.craft(chance, data)
        else:
            yield mutated(chance, data, other)


def run(
    target: Target,
    folder: Path,
    *,
    seed: int = 0,
    count: int | None = None,
    seconds: float | None = None,
) -> Tally:
    """Feed ``count`` inputs, or as many as ``seconds`` allow. Raises FindingError."""
    tally = Tally()
    ends = None if seconds is None else time.monotonic() + seconds
    for data in inputs(target, target.seeds(folder), seed):
        measure = tally.inputs % MEASURE_EVERY == 0
        tally.valid += check(target, data, folder, measure=measure)
        tally.inputs += 1
        if tally.inputs == count or (ends is not None and time.monotonic() >= ends):
            return tally
    raise AssertionError("the inputs never end")


def check(target: Target, data: bytes, folder: Path, *, measure: bool = True) -> bool:
    """Whether one input is valid. Raises FindingError."""
    for left in range(PATIENCE, 0, -1):
        began = time.process_time()
        try:
            valid = target.feed(data, folder)
        except Exception as error:
            raise FindingError(target, data, f"{type(error).__name__}: {error}") from error
        took = time.process_time() - began
        if took <= target.seconds:
            break
        if left == 1:
            raise FindingError(target, data, f"took {took:.2f} s")
    if measure:
        peak = _peak(target, data, folder)
        if peak > target.memory_bytes:
            raise FindingError(target, data, f"took {peak >> 20} MiB of memory")
    return valid


def _peak(target: Target, data: bytes, folder: Path) -> int:
    tracemalloc.start()
    try:
        with contextlib.suppress(Exception):
            target.feed(data, folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
