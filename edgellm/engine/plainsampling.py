"""Picking a token without llama.cpp: the same settings, in the same order, in numpy.

For engines that can be on a device without llama.cpp. What is drawn is a function of logits,
settings, tokens so far, seed and position, as with ``sampling.LlamaSampler``; the draws are others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm.engine.base import Float32, best_token, check_biases
from edgellm.types import SamplerSettings

Float64 = NDArray[np.float64]
_BITS = 53


def position_fraction(seed: int, position: int) -> float:
    """In [0, 1), for the token at ``position``: a pure function, equal on every device."""
    digest = hashlib.blake2b(
        b"fraction" + seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8
    )
    return (int.from_bytes(digest.digest(), "little") >> (64 - _BITS)) / float(1 << _BITS)


class PlainSampler:
    """One request's way of picking tokens; see ``base.Sampler``."""

    def __init__(self, settings: SamplerSettings, vocabulary: int) -> None:
        check_biases(settings, vocabulary)
        self._settings = settings
        self._vocabulary = vocabulary

    def sample(self, logits: Float32, position: int, history: Sequence[int]) -> int:
        """See ``base.Sampler``. Raises StageError for logits of a computation that failed."""
        settings = self._settings
        best_token(logits)  # refuses those of a computation that failed
        changed = self._changed(logits, history)
        if settings.greedy:
            return int(np.argmax(changed))
        # Largest first; of equal ones the lower id, so that the order is the same everywhere.
        order = np.argsort(-changed, kind="stable")
        if settings.top_k:
            order = order[: settings.top_k]
        values = changed[order].astype(np.float64)
        kept = _nucleus(values, settings.top_p)
        if settings.min_p > 0.0:
            kept = min(kept, int((values >= values[0] + np.log(settings.min_p)).sum()))
        chances = _chances(values[: max(kept, 1)] / settings.temperature)
        drawn = position_fraction(settings.seed, position)
        at = int(np.searchsorted(np.cumsum(chances), drawn, side="right"))
        return int(order[min(at, len(chances) - 1)])

    def _changed(self, logits: Float32, history: Sequence[int]) -> Float32:
        """With biases and penalties; a copy where there are any."""
        settings = self._settings
        recent = history[-settings.penalty_last_n :] if settings.penalty_last_n else ()
        if not settings.logit_bias and not recent:
            return logits
        changed = np.array(logits, np.float32)
        for token, bias in settings.logit_bias:
            changed[token] += np.float32(bias)
        for token, count in Counter(recent).items():
            if 0 <= token < self._vocabulary:
                changed[token] = self._penalised(float(changed[token]), count)
        return changed

    def _penalised(self, value: float, count: int) -> float:
        settings = self._settings
        repeat = settings.repeat_penalty
        value = value * repeat if value <= 0 else value / repeat
        return value - count * settings.frequency_penalty - settings.presence_penalty

    def close(self) -> None:
        """Nothing is kept between tokens."""


def _chances(values: Float64) -> Float64:
    weights = np.exp(values - values[0])
    made: Float64 = weights / weights.sum()
    return made


def _nucleus(values: Float64, share: float) -> int:
    """How many of the likeliest tokens reach ``share`` of the probability; at least one."""
    if share >= 1.0:
        return len(values)
    return int(np.searchsorted(np.cumsum(_chances(values)), share, side="left")) + 1
