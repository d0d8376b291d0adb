"""How many answers may be under way or wait for one model at once. Pure: time is an argument.

The model's own slots decide who runs; this only counts, so that a queue has an end and a client
that finds it full hears so at once, with when to come back.
"""

from __future__ import annotations

from edgellm.api.errors import busy

_MOST_WAIT_S = 60.0
_FIRST_GUESS_S = 5.0


class Gate:
    """``slots`` answers run, ``queue`` more may wait."""

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.queue = queue
        self.inside = 0
        self.refused = 0
        self._usual_s = _FIRST_GUESS_S

    @property
    def running(self) -> int:
        return min(self.inside, self.slots)

    @property
    def waiting(self) -> int:
        return self.inside - self.running

    def enter(self, count: int = 1) -> None:
        """Let ``count`` answers in. Raises ApiError 429."""
        self.check(count)
        self.inside += count

    def check(self, count: int = 1) -> None:
        """Raises ApiError 429 where ``count`` answers would not be let in now."""
        if self.inside + count > self.slots + self.queue:
            self.refused += 1
            raise busy(
                f"{self.running} answers are under way and {self.waiting} wait: the queue is full.",
                self.retry_after_s,
            )

    def leave(self, seconds: float) -> None:
        """One of them ended after so many seconds."""
        self.inside -= 1
        self._usual_s += (seconds - self._usual_s) / 8

    @property
    def retry_after_s(self) -> float:
        """About when a place in the queue will be free."""
        return min(_MOST_WAIT_S, max(1.0, self._usual_s / self.slots))
