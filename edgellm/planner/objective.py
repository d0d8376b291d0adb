"""What a plan is to be good at. Pure data.

A plan is judged by one number, in weighted seconds:

    ttft * TTFT + tpot * TPOT + period * seconds a request

where the last is what the busiest stage or link has to do for one request: with requests enough,
one leaves the pipeline in each such time. The least is the best.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

from edgellm.errors import UsageError
from edgellm.planner.speeds import Workload

_TERM = re.compile(r"(?P<name>ttft|tpot|throughput)\s*=\s*(?P<weight>[0-9]{1,12}(\.[0-9]{0,12})?)")
_HINT = "Write latency, ttft, tpot, throughput, or weights like ttft=1,tpot=100,throughput=0.5."


class Aim(enum.StrEnum):
    """The objectives that have a name."""

    LATENCY = "latency"
    """The whole of one request: its first token, and then all others."""
    TTFT = "ttft"
    """The time to the first token."""
    TPOT = "tpot"
    """The time of each later token."""
    THROUGHPUT = "throughput"
    """Requests a second, when there are always more of them waiting."""
    WEIGHTED = "weighted"


@dataclass(frozen=True, slots=True)
class Weights:
    """Of TTFT, of TPOT, and of the seconds a request."""

    ttft: float
    tpot: float
    period: float


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised. ``given`` are the weights of ``Aim.WEIGHTED``, and of that alone.

    Raises UsageError for weights that are none.
    """

    aim: Aim = Aim.LATENCY
    given: Weights | None = None

    def __post_init__(self) -> None:
        if (self.given is None) != (self.aim is not Aim.WEIGHTED):
            raise UsageError("weights belong to the objective 'weighted'.", hint=_HINT)
        if self.given is not None:
            each = (self.given.ttft, self.given.tpot, self.given.period)
            if not all(math.isfinite(one) and one >= 0 for one in each) or not any(each):
                raise UsageError(f"{each} cannot be the weights of an objective.", hint=_HINT)

    def weights(self, workload: Workload) -> Weights:
        """As they are for this workload."""
        if self.given is not None:
            return self.given
        tokens = float(workload.decoded)
        return {
            Aim.LATENCY: Weights(1.0, tokens, 0.0),
            Aim.TTFT: Weights(1.0, 0.0, 0.0),
            # Times the tokens, so that ties are of the same size whatever is aimed at.
            Aim.TPOT: Weights(0.0, max(1.0, tokens), 0.0),
            Aim.THROUGHPUT: Weights(0.0, 0.0, 1.0),
        }[self.aim]

    def __str__(self) -> str:
        if self.given is None:
            return self.aim.value
        weights = (
            ("ttft", self.given.ttft),
            ("tpot", self.given.tpot),
            ("throughput", self.given.period),
        )
        return ",".join(f"{name}={weight:g}" for name, weight in weights if weight)


def parse_objective(text: str) -> Objective:
    """Read ``--objective``. Raises UsageError with what may stand there."""
    plain = text.strip().lower()
    if plain in {aim.value for aim in Aim if aim is not Aim.WEIGHTED}:
        return Objective(Aim(plain))
    weights: dict[str, float] = {}
    for part in plain.split(","):
        match = _TERM.fullmatch(part.strip())
        if match is None or match["name"] in weights:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise UsageError(f"{shown!r} is no objective.", hint=_HINT)
        weights[match["name"]] = float(match["weight"])
    return Objective(
        Aim.WEIGHTED,
        Weights(weights.get("ttft", 0.0), weights.get("tpot", 0.0), weights.get("throughput", 0.0)),
    )
