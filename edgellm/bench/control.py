"""Two whole models at once, a processor each, against one alone: what the machine itself loses.

Processors share caches, memory and, on a rented machine, neighbours. What two independent processes
lose to one another no code can win back; what stages lose beyond it is ours.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import Any

from edgellm.bench.pairs import Case, Tell, in_turn, plain_run
from edgellm.bench.speed import Bench, whole_model
from edgellm.errors import UsageError
from edgellm.localcluster import our_processors


@dataclass(frozen=True, slots=True)
class Control:
    """One case, seconds a pair."""

    case: Case
    alone_s: tuple[float, ...]
    together_s: tuple[float, ...]
    """The slower of the two."""

    @property
    def ratios(self) -> list[float]:
        return [both / one for one, both in zip(self.alone_s, self.together_s, strict=True)]

    @property
    def ratio(self) -> float:
        """How much longer with a neighbour, and nothing else different."""
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "alone_s": round(statistics.median(self.alone_s), 6),
            "together_s": round(statistics.median(self.together_s), 6),
            "ratio": round(self.ratio, 4),
            "ratios": [round(ratio, 4) for ratio in self.ratios],
        }


async def measure_control(bench: Bench, tell: Tell) -> tuple[Control, ...]:
    """Run the pairs; minutes at the default counts. Raises UsageError on a single processor."""
    processors = our_processors()
    if len(processors) < 2:
        raise UsageError("the control needs two processors, and there is one.")
    async with (
        whole_model(bench, processors[:1]) as one,
        whole_model(bench, processors[1:2]) as other,
    ):
        done = []
        for case in bench.cases:
            prompt = case.tokens(bench.opened.vocab)

            async def alone(case: Case = case, prompt: list[int] = prompt) -> float:
                return (await plain_run(one, prompt, case.count))[case.figure]

            async def together(case: Case = case, prompt: list[int] = prompt) -> float:
                runs = [plain_run(child, prompt, case.count) for child in (one, other)]
                return max(figures[case.figure] for figures in await asyncio.gather(*runs))

            await together()  # warm
            pairs = []
            for number in range(bench.pairs):
                pairs.append(await in_turn(number, alone, together))
                tell(f"{case.name}: pair {number + 1} of {bench.pairs}")
            done.append(Control(case, *zip(*pairs, strict=True)))
        return tuple(done)
