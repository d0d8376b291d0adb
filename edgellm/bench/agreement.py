"""How far an answer made among others agrees with the same one made alone. Pure.

In normal mode the rows of several requests share a call, and other kernels sum in another order: a
token changes only where the two best were about equally likely, and the text then goes its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one answer."""

    tokens: int
    """That were compared."""
    agreed: int
    """Of these, before the first that differs."""
    gap: float | None
    """Between the logits of the two best tokens there, when it was alone; None: none differs."""


def agreement(
    alone: Sequence[int], logits: Sequence[NDArray[np.float32]], among_others: Sequence[int]
) -> Agreement:
    """``logits`` float32 [vocabulary] are those that the tokens ``alone`` were picked from."""
    tokens = min(len(alone), len(among_others))
    for at in range(tokens):
        if alone[at] != among_others[at]:
            second, best = np.sort(logits[at])[-2:]
            return Agreement(tokens, at, float(best - second))
    return Agreement(tokens, tokens, None)


def told(found: Sequence[Agreement]) -> dict[str, Any]:
    """Over several answers, as plain data."""
    gaps = [each.gap for each in found if each.gap is not None]
    return {
        "answers": len(found),
        "tokens": sum(each.tokens for each in found),
        "agreed": sum(each.agreed for each in found),
        "differ": len(gaps),
        "largest_gap": round(max(gaps), 4) if gaps else None,
    }
