"""Every fuzz target for a short while, always with the same inputs. Longer: ``scripts/fuzz``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.driver import FindingError, Target, check, mutated, run
from tests.fuzz.pairing_targets import TARGETS as PAIRING
from tests.fuzz.targets import TARGETS as PARSERS

TARGETS = (*PARSERS, *PAIRING)

COUNT = 1000


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_thousand_inputs_are_valid_or_refused(target: Target, tmp_path: Path) -> None:
    tally = run(target, tmp_path, count=COUNT)
    # A target that refuses everything, or takes everything, tests nothing.
    assert 0 < tally.valid < tally.inputs == COUNT


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_is_valid_is_taken(target: Target, tmp_path: Path) -> None:
    assert all(target.feed(data, tmp_path) for data in target.seeds(tmp_path))


def test_findings_are_found(tmp_path: Path) -> None:
    def broken(data: bytes, folder: Path) -> bool:
        return bool(1 / (250 - max(data, default=0)))

    def greedy(data: bytes, folder: Path) -> bool:
        return len(bytearray(64 << 20)) > 0

    def seeds(folder: Path) -> list[bytes]:
        return [b"\1seed"]

    with pytest.raises(FindingError, match="ZeroDivisionError") as found:
        run(Target("broken", seeds, broken), tmp_path, count=100_000)
    assert max(found.value.data) == 250
    with pytest.raises(FindingError, match="memory"):
        check(Target("greedy", seeds, greedy), b"x", tmp_path)


def test_mutations_repeat_with_their_seed() -> None:
    once, again = (
        [mutated(random.Random(seed), b"some bytes", b"others") for seed in range(50)]
        for _ in range(2)
    )
    assert once == again
    assert len(set(once)) > 25
