"""Log-probabilities of a row of logits. Pure numpy, the same for every engine."""

from __future__ import annotations

import numpy as np

from edgellm.engine.base import Float32
from edgellm.types import TopLogprobs


def top_logprobs(logits: Float32, chosen: int, count: int) -> TopLogprobs:
    """Of ``chosen``, and of the ``count`` likeliest tokens, the lower id first of equal ones.

    ``logits`` float32 [vocabulary], as the model gives them; sums are float64.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    count = min(count, len(values))
    best: list[int] = []
    if count:
        # The smallest logit that is among them; all that reach it, since equal ones have no order.
        least = np.partition(values, len(values) - count)[len(values) - count]
        among = np.flatnonzero(values >= least)
        best = among[np.argsort(-values[among], kind="stable")][:count].tolist()
    return TopLogprobs(
        chosen=min(0.0, float(values[chosen])),
        tokens=tuple(best),
        logprobs=tuple(min(0.0, float(values[token])) for token in best),
    )
