"""The page table against a brute force: lists of cells, compared token by token."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.scheduler.admission import PAGE_TOKENS
from edgellm.scheduler.kvpages import NO_SOURCE, Admission, page_names
from edgellm.scheduler.prefixes import PrefixTable
from edgellm.types import Reuse

pytestmark = pytest.mark.pure

BLOCKS = [[block * 1000 + at for at in range(40)] for block in range(3)]
"""What prompts are made of: shorter than a page, so that they part inside of pages."""


@dataclass
class Slot:
    """A sequence as the stages have it: each cell is an object of its own."""

    tokens: list[int]
    prompted: int
    chunk: int
    used_at: int
    cells: list[object] = field(default_factory=list)
    running: bool = True

    @property
    def held(self) -> int:
        return len(self.cells)


class Brute:
    """What ``PrefixTable`` should say, the slow way."""

    def __init__(self, slots: int, reuse: Reuse, exact: bool) -> None:
        self.slots, self.reuse, self.exact = slots, reuse, exact
        self.held: dict[int, Slot] = {}
        self.clock = itertools.count()

    def usable(self, other: Slot, tokens: list[int], prompted: int, chunk: int) -> int:
        if other.running and self.reuse < Reuse.COPY:
            return 0
        ends = [
            end
            for end in range(min(other.held, len(tokens) - 1) + 1)
            if other.tokens[:end] == tokens[:end]
        ]
        if self.exact:
            same = other.chunk == chunk
            most = min(prompted, other.prompted)
            ends = [end for end in ends if same and end <= most and end % chunk == 0]
        if self.reuse is Reuse.END:
            ends = [end for end in ends if end == other.held]
        return max((end for end in ends if end >= PAGE_TOKENS), default=0)

    def best(self, tokens: list[int], prompted: int, chunk: int) -> int:
        return max(
            (self.usable(other, tokens, prompted, chunk) for other in self.held.values()),
            default=0,
        )

    def retained(self) -> list[int]:
        ended = [number for number, slot in self.held.items() if not slot.running]
        return sorted(ended, key=lambda number: self.held[number].used_at)

    def worth(self, slot: Slot) -> int:
        if not self.exact:
            return slot.held
        whole = min(slot.held, slot.prompted) // slot.chunk * slot.chunk
        return 0 if self.reuse is Reuse.END and whole != slot.held else whole

    def pages(self) -> tuple[int, int]:
        """(pages, those of several sequences): a full page is what is in it, a part is its own."""
        owners: dict[Any, int] = {}
        for number, slot in self.held.items():
            for begin in range(0, slot.held, PAGE_TOKENS):
                cells = tuple(id(cell) for cell in slot.cells[begin : begin + PAGE_TOKENS])
                key = cells if len(cells) == PAGE_TOKENS else (number, begin)
                owners[key] = owners.get(key, 0) + 1
        return len(owners), sum(count > 1 for count in owners.values())


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(
    lambda blocks: [token for block in blocks for token in BLOCKS[block]]
)
MOVES = ("open", "open", "open", "grow", "grow", "grow", "end", "end", "drop")


@given(st.integers(0, 1 << 32), st.sampled_from(list(Reuse)), st.booleans())
@settings(max_examples=120, deadline=None)
def test_the_table_says_what_a_comparison_of_all_tokens_says(
    seed: int, reuse: Reuse, exact: bool
) -> None:
    """Some requests that begin alike, at random: what hypothesis would draw is mostly too short."""
    chance = random.Random(seed)
    slots = chance.randint(1, 5)
    table = PrefixTable(slots=slots, reuse=reuse, exact=exact)
    brute = Brute(slots, reuse, exact)
    for number in range(60):
        move = chance.choice(MOVES)
        running = [each for each, slot in brute.held.items() if slot.running]
        if move == "open" and len(running) < slots:
            _open(table, brute, number, _prompt(chance, brute), chance.choice([16, 64]))
        elif move == "drop" and brute.held and chance.random() < 0.3:
            dropped = chance.choice(sorted(brute.held))
            table.drop(dropped)
            del brute.held[dropped]
        elif running and move == "grow":
            grown = chance.choice(running)
            slot = brute.held[grown]
            slot.tokens.extend(range(chance.randrange(3)))  # the table has the same list
            held = min(len(slot.tokens), slot.held + chance.randint(1, 300))
            slot.cells += [object() for _ in range(held - slot.held)]
            table.grow(grown, held)
        elif running and move == "end":
            _end(table, brute, chance.choice(running))
        _compare(table, brute)


def _prompt(chance: random.Random, brute: Brute) -> list[int]:
    """Often one that goes on from somebody's tokens, or leaves them somewhere."""
    tokens: list[int] = []
    if brute.held and chance.random() < 0.7:
        known = chance.choice(list(brute.held.values()))
        cut = chance.choice([len(known.tokens), known.held, chance.randint(0, known.held)])
        tokens = known.tokens[:cut]
    for _ in range(chance.randrange(4)):
        tokens = tokens + chance.choice(BLOCKS)
    return [*tokens, *range(5, 5 + chance.randint(not tokens, 3))]


def _open(table: PrefixTable, brute: Brute, number: int, tokens: list[int], chunk: int) -> None:
    best = brute.best(tokens, len(tokens), chunk)
    retained = brute.retained()
    said = table.open(number, tokens, prompted=len(tokens), chunk=chunk)
    assert said.reused == best
    cells: list[object] = []
    now = next(brute.clock)
    if best:
        source = brute.held[said.source]
        assert brute.usable(source, tokens, len(tokens), chunk) == best
        source.used_at = now
        cells = source.cells[:best] if brute.reuse is Reuse.SHARE or said.moved else []
        cells = cells or [object() for _ in range(best)]
        if said.moved:
            assert not source.running
            del brute.held[said.source]
        assert said.moved or brute.reuse >= Reuse.COPY
    else:
        assert said == Admission(closed=said.closed)
        assert said.source == NO_SOURCE
    # whoever makes room ended the longest time ago, and no more of them than needed
    others = [each for each in retained if each != said.source]
    assert list(said.closed) == others[: len(said.closed)]
    for each in said.closed:
        del brute.held[each]
    assert not said.closed or len(brute.held) == brute.slots - 1
    brute.held[number] = Slot(tokens, len(tokens), chunk, now, cells)
    assert len(brute.held) <= brute.slots


def _end(table: PrefixTable, brute: Brute, number: int) -> None:
    slot = brute.held[number]
    offers = {each: _offers(brute, each) for each in brute.retained()}
    closed = table.retain(number).closed
    slot.running, slot.used_at = False, next(brute.clock)
    mine = _offers(brute, number)
    if number in closed:
        # nothing of it is lost
        assert closed == (number,)
        covering = [each for each, theirs in offers.items() if mine and mine <= theirs]
        assert not mine or covering
        for each in covering[:1]:
            brute.held[each].used_at = slot.used_at
    else:
        assert mine
        assert all(offers[each] <= mine for each in closed)
        assert all(each in closed for each, theirs in offers.items() if theirs <= mine)
    for each in closed:
        del brute.held[each]


def _offers(brute: Brute, number: int) -> set[Any]:
    """All beginnings that a sequence, once it has ended, could give to another one."""
    slot = brute.held[number]
    worth = brute.worth(slot)
    if worth < PAGE_TOKENS:
        return set()
    ends = range(1, worth + 1)
    if brute.reuse is Reuse.END:
        ends = range(worth, worth + 1)
    elif brute.exact:
        ends = range(slot.chunk, worth + 1, slot.chunk)
    chunk = slot.chunk if brute.exact else 0
    return {(chunk, tuple(slot.tokens[:end])) for end in ends}


def _compare(table: PrefixTable, brute: Brute) -> None:
    assert set(table) == set(brute.held)
    assert list(table.retained()) == brute.retained()
    figures = table.figures()
    assert (figures.used, figures.shared) == brute.pages()
    assert figures.retained == len(brute.retained())


@given(prompts, st.integers(0, 300), st.integers(0, 300))
def test_names_are_equal_where_all_tokens_before_are(
    tokens: list[int], change: int, cut: int
) -> None:
    names = list(page_names(b"model", tokens))
    assert len(names) == len(tokens) // PAGE_TOKENS
    assert list(page_names(b"model", tokens[:cut])) == names[: min(cut, len(tokens)) // PAGE_TOKENS]
    assert list(page_names(b"model", tokens, names[:1])) == names[1:]
    assert not set(page_names(b"another", tokens)) & set(names)
    if change < len(tokens):
        other = [*tokens[:change], tokens[change] + 1, *tokens[change + 1 :]]
        pairs = zip(page_names(b"model", other), names, strict=True)
        first = change // PAGE_TOKENS
        assert [left == right for left, right in pairs] == [at < first for at in range(len(names))]
