"""Who may run now: slots and KV pages are given out, waited for in line, and taken back. Pure.

A request that arrives runs at once where there is a slot, and pages of KV for its tokens; else it
waits, in a line of bounded length. Higher priorities go first, and take the slots of lower ones;
among equals who came first. Where pages run out while answers grow, the youngest of the lowest
priority gives its own back, waits at its old place in line, and is computed again from its journal
later. Whoever was overtaken too often counts as the most urgent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from edgellm.errors import BusyError

PAGE_TOKENS = 64
"""Positions of one sequence in a page of KV."""
PATIENCE = 16
"""How often younger requests may be admitted before one that waits."""
MAX_RETRY_S = 600.0
_SMOOTHING = 0.2
_FIRST_GUESS_S = 2.0
"""How long a request runs, before any has ended."""


@dataclass(frozen=True, slots=True)
class Admit:
    """Let it run: it is its turn."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """Free its memory; it waits again."""

    ticket: int


Effect: TypeAlias = Admit | Preempt


@dataclass(slots=True)
class _Ticket:
    number: int
    priority: int
    tokens: int
    pages: int = 0
    """That it has; 0 while it waits."""
    overtaken: int = 0
    preempted: bool = False
    since: float = 0.0
    """When it was admitted."""

    @property
    def urgent(self) -> bool:
        return self.overtaken >= PATIENCE

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The smallest goes first."""
        return not self.urgent, 0 if self.urgent else -self.priority, self.number


class Admission:
    """See the module. Tickets are numbers that grow with every request."""

    def __init__(self, *, slots: int, pages: int, line: int) -> None:
        """``pages`` of KV for all slots together; 0 where every slot has all that it may need.
        ``line`` is the most requests that may wait, beside those that were preempted."""
        self._slots = slots
        self._pages = pages
        self._line = line
        self._running: dict[int, _Ticket] = {}
        self._waiting: dict[int, _Ticket] = {}
        self._lasts_s = _FIRST_GUESS_S

    @property
    def running(self) -> frozenset[int]:
        return frozenset(self._running)

    @property
    def waiting(self) -> tuple[int, ...]:
        """In the order of their turns."""
        return tuple(t.number for t in sorted(self._waiting.values(), key=lambda t: t.rank))

    @property
    def free_pages(self) -> int:
        """Where they are counted."""
        return self._pages - sum(ticket.pages for ticket in self._running.values())

    def arrive(self, ticket: int, tokens: int, priority: int, now: float) -> list[Effect]:
        """A request with so many tokens. ``now`` in seconds, by any clock that only goes on.

        Raises BusyError when the line is full and it is not its turn at once; it is not known
        then.
        """
        self._waiting[ticket] = _Ticket(ticket, priority, tokens)
        effects = self._admit(now)
        if ticket in self._waiting:
            line = sum(not each.preempted for each in self._waiting.values())
            if line > self._line:
                del self._waiting[ticket]
                raise BusyError(
                    f"{line - 1} requests wait already.",
                    hint="Try again later.",
                    retry_after_s=self.retry_after_s,
                )
        return effects

    def grow(self, ticket: int, tokens: int, now: float) -> list[Effect]:
        """One that runs has so many tokens now."""
        entry = self._running.get(ticket)
        if entry is None:
            return []
        entry.tokens = tokens
        needed = pages_of(tokens)
        if not self._pages or needed <= entry.pages:
            return []
        effects: list[Effect] = []
        while self.free_pages < needed - entry.pages:
            victim = max(self._running.values(), key=lambda each: each.rank)
            effects.append(self._preempt(victim))
            if victim is entry:
                return effects + self._admit(now)
        entry.pages = needed
        return effects

    def leave(self, ticket: int, now: float) -> list[Effect]:
        """It has ended, or was given up, running or not. Harmless when repeated."""
        self._waiting.pop(ticket, None)
        entry = self._running.pop(ticket, None)
        if entry is not None:
            self._lasts_s += _SMOOTHING * (now - entry.since - self._lasts_s)
        return self._admit(now)

    @property
    def retry_after_s(self) -> float:
        """When somebody who is refused now may find room: one has to leave the line."""
        return min(MAX_RETRY_S, max(1.0, self._lasts_s / self._slots))

    def _admit(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._waiting:
            first = min(self._waiting.values(), key=lambda each: each.rank)
            victims = self._in_the_way(first)
            if victims is None:
                break
            effects += [self._preempt(victim) for victim in victims]
            del self._waiting[first.number]
            for other in self._waiting.values():
                other.overtaken += other.number < first.number
            first.pages = pages_of(first.tokens) if self._pages else 0
            first.since, first.preempted = now, False
            self._running[first.number] = first
            effects.append(Admit(first.number))
        return effects

    def _in_the_way(self, first: _Ticket) -> list[_Ticket] | None:
        """Who must make room for it, nobody if there is some; None where it has to wait."""
        left = sorted(self._running.values(), key=lambda each: each.rank)
        victims: list[_Ticket] = []
        while not self._fits(first, left):
            if not left or left[-1].urgent or left[-1].priority >= first.priority:
                return None
            victims.append(left.pop())
        return victims

    def _fits(self, ticket: _Ticket, beside: list[_Ticket]) -> bool:
        if len(beside) >= self._slots:
            return False
        if not self._pages or not beside:
            return True
        # A page for each to grow into: one that must give way again at once is computed in vain.
        taken = sum(each.pages + 1 for each in beside)
        return taken + pages_of(ticket.tokens) + 1 <= self._pages

    def _preempt(self, victim: _Ticket) -> Preempt:
        del self._running[victim.number]
        victim.pages, victim.preempted = 0, True
        self._waiting[victim.number] = victim
        return Preempt(victim.number)


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)
