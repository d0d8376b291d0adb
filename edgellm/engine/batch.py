"""A ``llama_batch`` over numpy arrays: what one decode call of llama.cpp is given.

This file runs in a stage process only. It knows of rows and positions, nothing of models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.engine.base import SlotRow
from edgellm.engine.bindings import set_fields


class Batch:
    """So that filling a batch costs no Python loop a row."""

    def __init__(self, module: Any, capacity: int, width: int, sections: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.hidden = np.zeros((capacity, width), np.float32) if width else None
        self.positions = np.zeros(capacity * sections, np.int32)
        self.counts = np.ones(capacity, np.int32)
        self.slots = np.zeros(capacity, np.int32)
        self.outputs = np.zeros(capacity, np.int8)
        self.sections = sections
        base = self.slots.ctypes.data
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._slot_pointers = (pointer * capacity)(
            *(ctypes.cast(base + 4 * i, pointer) for i in range(capacity))
        )
        self.native = module.llama_batch()
        set_fields(
            self.native,
            n_tokens=0,
            pos=self.positions.ctypes.data_as(pointer),
            n_seq_id=self.counts.ctypes.data_as(pointer),
            seq_id=self._slot_pointers,
            logits=self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        if self.hidden is not None:
            floats = ctypes.POINTER(ctypes.c_float)
            set_fields(self.native, embd=self.hidden.ctypes.data_as(floats))
        else:
            set_fields(self.native, token=self.tokens.ctypes.data_as(pointer))

    def place(self, rows: Sequence[SlotRow], all_outputs: bool) -> int:
        """Write slots, positions and output flags of ``rows``; returns the number of tokens."""
        total = sum(row.count for row in rows)
        at = 0
        self.outputs[:total] = 1 if all_outputs else 0
        for row in rows:
            end = at + row.count
            self.slots[at:end] = row.slot
            self.positions[at:end] = np.arange(row.position, row.position + row.count)
            if row.output:
                self.outputs[end - 1] = 1
            at = end
        if self.sections == 4:
            # section by section: p, p, p, 0; the sections are as long as the batch, so the text
            # positions just written move into place behind one another
            self.positions[total : 2 * total] = self.positions[:total]
            self.positions[2 * total : 3 * total] = self.positions[:total]
            self.positions[3 * total : 4 * total] = 0
        self.native.n_tokens = total
        return total
