"""The nouns that every layer shares, as frozen dataclasses. No behaviour beyond validation.

This file may import only ``errors``. Units are in the names or the docstrings:
bytes, tokens, seconds. Layer spans are half open: ``[first, end)``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NewType

from edgellm.errors import UsageError

DeviceId = NewType("DeviceId", str)
"""Stable identity of a device (64 lower-case hex digits)."""

Epoch = NewType("Epoch", int)
"""Number of a plan. A frame of another epoch than the current one is stale."""


class Mode(enum.StrEnum):
    """The two tiers of the exactness contract."""

    REFERENCE = "reference"
    """float32 activations, one sequence a decode call, split KV cache: bit-equal to the whole."""
    NORMAL = "normal"
    """float16 activations with a power-of-two scale a row, shared cache, batches."""


class Activations(enum.StrEnum):
    """How hidden states travel between stages."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class Weights(enum.StrEnum):
    """How a stage keeps its weights in memory."""

    AUTO = "auto"
    """As this device found to be faster; in reference mode as llama.cpp does it by itself."""
    REPACKED = "repacked"
    """Rearranged for kernels of their own where llama.cpp has some for this processor."""
    PLAIN = "plain"
    """As they are in the file: loads sooner; prompts are faster on some processors, answers a
    little slower."""


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""The KV cache types that llama.cpp knows, by their ggml names."""


@dataclass(frozen=True, slots=True, order=True)
class LayerSpan:
    """Layers ``first`` (included) to ``end`` (excluded) of a model."""

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise UsageError(f"layer span [{self.first}, {self.end}) is empty or negative.")

    def __len__(self) -> int:
        return self.end - self.first

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.end


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything that decides the numbers a stage computes, and its memory.

    All stages of a plan share these, but for ``threads`` and ``pin``.
    """

    context: int = 2048
    """KV cells per sequence, tokens."""
    sequences: int = 1
    """Sequences that may be resident at once."""
    chunk: int = 128
    """Largest number of tokens in one decode call (llama.cpp's n_batch and n_ubatch)."""
    prompt_chunk: int = 0
    """Tokens in each chunk of a prompt; 0 lets the prompt's length decide."""
    kv_type: str = "f16"
    mode: Mode = Mode.NORMAL
    activations: Activations = Activations.FLOAT16
    flash_attention: bool = True
    swa_full: bool = True
    threads: int = 0
    """Of one stage; 0 leaves it to each device. An engine is always told a number."""
    pin: tuple[int, ...] = ()
    """Processors to pin the stage process to; empty leaves it to the system."""
    weights: Weights = Weights.AUTO

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise UsageError(
                f"KV type {self.kv_type!r} is unknown.", hint=f"Use one of {', '.join(KV_TYPES)}."
            )
        for name, low, high in (
            ("context", 8, 1 << 24),
            ("sequences", 1, 256),
            ("chunk", 1, 4096),
            ("prompt_chunk", 0, self.chunk),
            ("threads", 0, 512),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} {value} is outside {low} to {high}.")


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """How the last stage picks a token. Randomness is a function of (seed, position)."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1 << 20),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
            ("penalty_last_n", 0, 4096),
            ("seed", 0, (1 << 53) - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise UsageError(f"sampler setting {name} {value} is outside {low} to {high}.")
        if len(self.logit_bias) > 1024:
            raise UsageError("logit_bias has more than 1024 entries.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One device's share of a plan."""

    device: str
    """The device's name, as people type it."""
    device_id: DeviceId
    span: LayerSpan
    memory_bytes: int
    """Predicted peak memory of the stage process."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An ordered list of stages that together hold all layers of one model."""

    epoch: Epoch
    layers: int
    stages: tuple[Stage, ...]
    settings: EngineSettings = field(default_factory=EngineSettings)
    why: str = ""
    """The planner's reason in words."""

    def __post_init__(self) -> None:
        expected = 0
        for stage in self.stages:
            if stage.span.first != expected:
                raise UsageError(
                    f"stage on {stage.device} begins at layer {stage.span.first},"
                    f" but layer {expected} is next."
                )
            expected = stage.span.end
        if expected != self.layers:
            raise UsageError(f"the stages end at layer {expected} of {self.layers}.")
