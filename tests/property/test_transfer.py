"""Whatever sources do, a transfer ends: with every piece once, verified, or stuck with a reason.

A simulated network drives the pure state machine: sources of different speeds that hold different
tensors, lie, refuse, fall silent, leave and come back. No more is ever asked than the limits allow.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.scheduler.transfer import IN_ALL, PER_SOURCE, SILENCE, Ask, Piece, Transfer

pytestmark = pytest.mark.pure

TIMEOUT_S = 5.0
LENGTH = 512 * 1024


def pieces_of(tensors: dict[str, int]) -> list[Piece]:
    """``tensors``: number of pieces by digest; the last of each is short."""
    found = []
    for digest, count in tensors.items():
        for index in range(count):
            length = LENGTH if index < count - 1 else 1000
            found.append(Piece(digest, index, index * LENGTH, length))
    return found


@dataclass(frozen=True)
class Behaviour:
    """Of a source. Times are counted from the beginning."""

    holds: frozenset[str]
    claims: frozenset[str]
    """What it says it holds; what it does not hold it refuses."""
    piece_s: float
    """It answers one piece after the other, each in this time."""
    joins_at: float = 0.0
    leaves_at: float | None = None
    """After it joined."""
    silent_from: float | None = None
    lies_at: int | None = None
    """Its answer of this number is wrong."""


@dataclass
class Network:
    """Carries out what the transfer says, in simulated time, and checks the limits."""

    transfer: Transfer
    behaviours: dict[str, Behaviour]
    now: float = 0.0
    written: dict[Piece, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    asked: list[Ask] = field(default_factory=list)
    outstanding: dict[str, list[Piece]] = field(default_factory=dict)
    """Asked and not answered."""
    gone: set[str] = field(default_factory=set)
    peak: int = 0
    """The most that were ever outstanding at once, late ones too."""
    steps: int = 0

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._busy_until: dict[str, float] = {}
        for name, behaviour in self.behaviours.items():
            self._at(behaviour.joins_at, lambda n=name: self._join(n))  # type: ignore[misc]
            if behaviour.leaves_at is not None:
                leaves_at = behaviour.joins_at + behaviour.leaves_at
                self._at(leaves_at, lambda n=name: self._leave(n))  # type: ignore[misc]

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _join(self, name: str) -> None:
        self.transfer.join(name, self.behaviours[name].claims)

    def _leave(self, name: str) -> None:
        self.gone.add(name)
        self.outstanding.pop(name, None)
        self.transfer.leave(name)

    def _ask(self, ask: Ask) -> None:
        name, piece = ask
        assert name not in self.gone
        assert name not in self.transfer.liars
        behaviour = self.behaviours[name]
        assert piece.digest in behaviour.claims
        assert piece not in self.written, "asked for what is there"
        mine = self.outstanding.setdefault(name, [])
        assert piece not in mine, "asked twice of one source"
        mine.append(piece)
        assert len(mine) <= PER_SOURCE
        self.peak = max(self.peak, sum(len(pieces) for pieces in self.outstanding.values()))
        self.asked.append(ask)
        start = max(self.now, self._busy_until.get(name, 0.0))
        end = start + behaviour.piece_s
        self._busy_until[name] = end
        if behaviour.silent_from is None or end < behaviour.silent_from:
            self._at(end, lambda: self._answer(name, piece))

    def _answer(self, name: str, piece: Piece) -> None:
        if name in self.gone or name in self.transfer.liars:
            return
        behaviour = self.behaviours[name]
        self.outstanding[name].remove(piece)
        if piece.digest not in behaviour.holds:
            self.transfer.refused(name, piece, self.now)
            return
        number = self.answers.get(name, 0)
        self.answers[name] = number + 1
        good = number != behaviour.lies_at
        if good:
            self.written[piece] = self.written.get(piece, 0) + 1
        else:
            self.outstanding.pop(name)
        self.transfer.arrived(name, piece, good, self.now)

    def run(self) -> None:
        while True:
            self.steps += 1
            assert self.steps < 50_000
            for ask in self.transfer.poll(self.now):
                self._ask(ask)
            assert self.transfer.poll(self.now) == ()  # everything was said
            if self.transfer.done:
                return
            wake = self.transfer.wake_at()
            times = [self._events[0][0]] if self._events else []
            if wake is not None:
                assert wake > self.now
                times.append(wake)
            if not times:
                assert self.transfer.stuck
                return
            self.now = min(times)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Behaviour]]:
    names = [f"t{i}" for i in range(draw(st.integers(1, 6)))]
    tensors = {name: draw(st.integers(1, 8)) for name in names}
    subset = st.frozensets(st.sampled_from(names))
    moment = st.floats(0.0, 40.0, allow_nan=False)
    behaviours = {}
    for index in range(draw(st.integers(1, 5))):
        holds = draw(subset)
        behaviours[f"s{index}"] = Behaviour(
            holds=holds,
            claims=holds | draw(subset),
            piece_s=draw(st.sampled_from([0.01, 0.3, 1.0, 4.0, 12.0])),
            joins_at=draw(st.just(0.0) | moment),
            leaves_at=draw(st.none() | moment),
            silent_from=draw(st.none() | moment),
            lies_at=draw(st.none() | st.integers(0, 10)),
        )
    return tensors, behaviours


@settings(deadline=None, max_examples=300)
@given(cases())
def test_it_ends_well_or_says_why(case: tuple[dict[str, int], dict[str, Behaviour]]) -> None:
    tensors, behaviours = case
    pieces = pieces_of(tensors)
    transfer = Transfer(pieces, timeout_s=TIMEOUT_S)
    network = Network(transfer, behaviours)
    network.run()
    progress = transfer.progress
    assert progress.total_bytes == sum(piece.length for piece in pieces)
    assert progress.done_bytes == sum(piece.length for piece in network.written)
    assert progress.done_bytes == sum(progress.by_source.values())
    wrong = sum(name in transfer.liars for name in behaviours)
    twice = sum((count - 1) * piece.length for piece, count in network.written.items())
    assert progress.wasted_bytes <= twice + wrong * LENGTH
    assert transfer.done == (set(network.written) == set(pieces))
    assert transfer.done != bool(transfer.stuck)
    liars = {
        name
        for name, behaviour in behaviours.items()
        if behaviour.lies_at is not None and network.answers.get(name, 0) > behaviour.lies_at
    }
    assert transfer.liars == liars
    faithful = [
        behaviour
        for behaviour in behaviours.values()
        if behaviour.leaves_at is behaviour.silent_from is behaviour.lies_at is None
        and behaviour.piece_s * PER_SOURCE < SILENCE * TIMEOUT_S
    ]
    had = {digest for behaviour in faithful for digest in behaviour.holds}
    assert all(piece in network.written for piece in pieces if piece.digest in had)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.lists(st.sampled_from([0.05, 0.1, 0.5]), min_size=1, max_size=5))
def test_the_limits_hold_for_faithful_sources(count: int, speeds: list[float]) -> None:
    transfer = Transfer(pieces_of({"t": count}), timeout_s=100.0)
    everything = frozenset(("t",))
    network = Network(
        transfer, {f"s{i}": Behaviour(everything, everything, s) for i, s in enumerate(speeds)}
    )
    network.run()
    assert transfer.done
    peak = network.peak
    assert peak <= IN_ALL
    assert peak == min(IN_ALL, PER_SOURCE * len(speeds), count) or len(speeds) == 1
    assert len(network.asked) <= count + IN_ALL  # doubled in the end game only


def both(*names: str) -> Transfer:
    """Two tensors of 8 pieces; sources have both."""
    transfer = Transfer(pieces_of({"t": 8, "u": 8}), timeout_s=TIMEOUT_S)
    for name in names:
        transfer.join(name, {"t", "u"})
    return transfer


def test_no_more_than_three_a_source_and_six_in_all() -> None:
    assert len(both("a").poll(0.0)) == 3
    asks = both("a", "b", "c").poll(0.0)
    assert len(asks) == 6
    assert sorted(ask.source for ask in asks) == list("aabbcc")
    assert len({ask.piece for ask in asks}) == 6


def test_faster_sources_get_more() -> None:
    transfer = Transfer(pieces_of({"t": 200}), timeout_s=60.0)
    everything = frozenset(("t",))
    network = Network(
        transfer,
        {
            "slow": Behaviour(everything, everything, 1.0),
            "fast": Behaviour(everything, everything, 0.1),
        },
    )
    network.run()
    by_source = transfer.progress.by_source
    assert 7 < by_source["fast"] / by_source["slow"] < 13
    assert network.now < 1.15 * 200 / 11  # what both together take


def test_what_few_have_is_asked_first() -> None:
    """``b`` alone has ``u``: it is not kept busy with what ``a`` has as well."""
    transfer = Transfer(pieces_of({"t": 8, "u": 3}), timeout_s=TIMEOUT_S)
    transfer.join("a", {"t"})
    transfer.join("b", {"t", "u"})
    asks = transfer.poll(0.0)
    assert {ask.piece.digest for ask in asks if ask.source == "b"} == {"u"}


def test_a_liar_is_dropped_and_its_pieces_go_elsewhere() -> None:
    transfer = both("a", "b")
    asks = transfer.poll(0.0)
    (lie, *others) = [ask for ask in asks if ask.source == "a"]
    transfer.arrived("a", lie.piece, False, 1.0)
    assert transfer.liars == {"a"}
    transfer.join("a", {"t", "u"})  # it does not get in again
    for ask in [ask for ask in asks if ask.source == "b"]:
        transfer.arrived("b", ask.piece, True, 1.0)
    again = transfer.poll(1.0)
    assert {ask.source for ask in again} == {"b"}
    assert {ask.piece for ask in again} <= {ask.piece for ask in (lie, *others)} | set(
        pieces_of({"t": 8, "u": 8})
    )
    transfer.leave("b")
    assert transfer.poll(1.0) == ()
    assert "sent wrong bytes" in transfer.stuck
    transfer.join("c", {"t", "u"})
    assert transfer.stuck == ""
    assert len(transfer.poll(1.0)) == 3


def test_a_slow_source_is_suspect_until_it_has_answered() -> None:
    transfer = both("a", "b")
    first = transfer.poll(0.0)
    mine = [ask.piece for ask in first if ask.source == "a"]
    for piece in (ask.piece for ask in first if ask.source == "b"):
        transfer.arrived("b", piece, True, 4.9)
    transfer.poll(4.9)
    assert transfer.wake_at() == TIMEOUT_S
    asks = transfer.poll(TIMEOUT_S)
    assert transfer.suspects == {"a"}
    assert {ask.source for ask in asks} <= {"b"}
    for piece in mine:
        transfer.arrived("a", piece, True, 6.0)  # late, and welcome
    assert transfer.suspects == frozenset()
    assert transfer.progress.by_source["a"] == 3 * LENGTH
    assert any(ask.source == "a" for ask in transfer.poll(6.0))


def test_a_silent_source_is_given_up() -> None:
    transfer = both("a")
    transfer.poll(0.0)
    now = 0.0
    while (wake := transfer.wake_at()) is not None:
        now = wake
        transfer.poll(now)
    assert now == SILENCE * TIMEOUT_S
    assert "a gave no answer for 20 s" in transfer.stuck
    assert "2 tensors" in transfer.stuck
    transfer.join("a", {"t", "u"})  # it is back
    assert len(transfer.poll(now)) == 3


def test_idle_time_is_no_silence() -> None:
    transfer = Transfer(pieces_of({"t": 1, "u": 1}), timeout_s=TIMEOUT_S)
    transfer.join("a", {"t"})
    (ask,) = transfer.poll(0.0)
    transfer.arrived("a", ask.piece, True, 1.0)
    transfer.join("a", {"t", "u"})
    assert len(transfer.poll(1000.0)) == 1
    transfer.poll(1000.0 + TIMEOUT_S)
    assert transfer.suspects == {"a"}
    assert transfer.stuck == ""


def test_the_last_piece_of_a_slow_source_is_asked_elsewhere_too() -> None:
    transfer = Transfer(pieces_of({"t": 4}), timeout_s=60.0)
    transfer.join("slow", {"t"})
    (stuck_one, *_) = transfer.poll(0.0)
    transfer.join("fast", {"t"})
    (ask,) = transfer.poll(0.0)
    assert ask.source == "fast"
    transfer.arrived("fast", ask.piece, True, 1.0)
    assert transfer.poll(1.0) == ()  # it may still come
    assert transfer.wake_at() == 2.0
    (help_,) = transfer.poll(2.0)
    assert help_ == Ask("fast", stuck_one.piece)
    transfer.arrived("fast", help_.piece, True, 3.0)
    transfer.arrived("slow", help_.piece, True, 3.5)
    assert transfer.progress.wasted_bytes == help_.piece.length
    assert transfer.progress.by_source["fast"] == LENGTH + 1000


def test_a_refusal_sends_a_piece_elsewhere() -> None:
    transfer = both("a")
    for ask in transfer.poll(0.0):
        transfer.refused("a", ask.piece, 1.0)
    (*more,) = transfer.poll(1.0)
    assert {ask.piece.digest for ask in more} == {"u"}
    for ask in more:
        transfer.refused("a", ask.piece, 1.0)
    assert transfer.poll(1.0) == ()
    assert transfer.stuck
    assert transfer.needed == {"t", "u"}
    transfer.refused("nobody", more[0].piece, 1.0)
    transfer.join("a", {"t"})  # asked again what it holds
    assert transfer.stuck == ""
    assert len(transfer.poll(1.0)) == 3


def test_nothing_to_do() -> None:
    transfer = Transfer((), timeout_s=1.0)
    assert transfer.done
    assert transfer.stuck == ""
    assert transfer.poll(0.0) == ()
    assert transfer.wake_at() is None
