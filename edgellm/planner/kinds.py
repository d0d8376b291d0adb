"""Element types of weights, and which of those that are measured stands for each other. Pure.

A type decides how fast weights are: how many bytes there are, and how much it takes to multiply
with them. On processors without much bandwidth to spare the second counts as much as the first, so
bytes a second differ between types by a factor of two and more.
"""

from __future__ import annotations

MEASURED_KINDS = ("q4_K", "q6_K", "q8_0", "f16", "q4_0")
"""What a probe measures: the types of nearly all files that people run."""

_LIKE = {
    "q4_K": ("q2_K", "q3_K", "q5_K", "q8_K", "iq4_xs", "tq1_0", "tq2_0", "iq1_s", "iq1_m",
             "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"),
    "q8_0": ("q8_1", "i8"),
    "f16": ("bf16", "f32", "i16", "i32", "f64", "i64"),
    "q4_0": ("q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "nvfp4", "q1_0", "q2_0"),
}  # fmt: skip
"""By how they are laid out: blocks of 256 with scales of scales, blocks of 32 with one scale, or no
blocks at all. Types with code books are slower than what stands for them here."""

_NEAREST = {other: kind for kind, others in _LIKE.items() for other in others}


def nearest_kind(kind: str) -> str:
    """The measured type that is most like ``kind``: itself where it is one; empty for a type that
    nothing is known of, such as those of ONNX graphs."""
    return kind if kind in MEASURED_KINDS else _NEAREST.get(kind, "")
