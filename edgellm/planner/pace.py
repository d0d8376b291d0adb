"""How long the layers before each cut take on each device: work by rates. Pure.

Weights count by their element type, attention by what was measured of it. Running sums over the
cuts, so that what a span takes is a difference; overheads are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.planner.inputs import SpanTable, StageWork
from edgellm.planner.speeds import DeviceSpeed, Workload

Table = NDArray[np.float64]


class Pace:
    """Seconds. Arrays are float64 ``[device, cut]``, but for ``head``, which is ``[device]``."""

    def __init__(self, spans: SpanTable, workload: Workload, speeds: Sequence[DeviceSpeed]) -> None:
        pieces = range(spans.pieces)
        decode = [spans.work(piece, workload.cached_in_decode) for piece in pieces]
        prefill = [spans.work(piece, workload.cached_in_prefill) for piece in pieces]
        tokens = workload.chunk_tokens
        reading = [[_read_s(work, speed) for work in decode] for speed in speeds]
        self.decode = _running(
            [
                [read + _scan_s(work, speed) for read, work in zip(row, decode, strict=True)]
                for row, speed in zip(reading, speeds, strict=True)
            ]
        )
        """One token."""
        self.read = _running(reading)
        """Reading the weights once: what a chunk takes at least, however few its tokens are."""
        self.computed = _running(
            [[tokens * _compute_s(work, speed) for work in prefill] for speed in speeds]
        )
        """A chunk's operations."""
        self.head = np.array([head_s(decode[-1], speed) for speed in speeds])
        """One row of logits."""


def head_s(work: StageWork, speed: DeviceSpeed) -> float:
    """One row of logits; 0 but for a span that ends with the last layer."""
    return work.head_bytes / speed.rates(work.head_kind).decode_bytes_per_s


def _read_s(work: StageWork, speed: DeviceSpeed) -> float:
    told = [(one.nbytes, speed.rates(one.kind)) for one in work.by_kind]
    rest = work.decode_bytes - sum(nbytes for nbytes, _ in told)
    seconds = sum(nbytes / rates.decode_bytes_per_s for nbytes, rates in told)
    return seconds + max(0, rest) / speed.decode_bytes_per_s


def _scan_s(work: StageWork, speed: DeviceSpeed) -> float:
    """Cells and states are read, or as many operations done with them, whichever takes longer."""
    read = work.scan_bytes / speed.decode_bytes_per_s
    if speed.attention is None:
        return read
    return max(read, work.scan_flops / speed.attention.decode_flops_per_s)


def _compute_s(work: StageWork, speed: DeviceSpeed) -> float:
    """Of one token of a chunk."""
    told = [(2 * one.elements, speed.rates(one.kind)) for one in work.by_kind]
    rest = work.prefill_flops - sum(flops for flops, _ in told)
    seconds = sum(flops / rates.prefill_flops_per_s for flops, rates in told)
    seconds += max(0, rest) / speed.prefill_flops_per_s
    attended = speed.attention.prefill_flops_per_s if speed.attention else speed.prefill_flops_per_s
    return seconds + work.scan_flops / attended


def _running(amounts: Sequence[Sequence[float]]) -> Table:
    table = np.array(amounts, np.float64)
    return np.concatenate((np.zeros((len(table), 1)), np.cumsum(table, axis=1)), axis=1)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a span takes on a device, by what it goes to. Seconds."""

    read_s: float
    """Its weights, once."""
    compute_s: float
    """The operations of one token of a chunk."""
    scan_s: float
    """The cells that one token attends to."""
    head_s: float
    overhead_s: float
    """Of each call of the engine."""


def parts_of(work: StageWork, speed: DeviceSpeed) -> Parts:
    """The parts of which steps of answers and prompts are made."""
    return Parts(
        _read_s(work, speed),
        _compute_s(work, speed),
        _scan_s(work, speed),
        head_s(work, speed),
        speed.step_overhead_s,
    )
