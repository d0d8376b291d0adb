"""How the fault bench counts: it must see what it says is not there."""

from __future__ import annotations

import pytest

from edgellm.bench.faults import (
    Damage,
    Fault,
    Outcome,
    Series,
    Trial,
    damage_against,
    damage_shown,
    percentiles,
    seeded_trials,
)

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("positions", "damage"),
    [
        ([5, 6, 7, 8], Damage()),
        ([5, 6, 7], Damage(lost=1)),
        ([5, 6, 6, 7, 8], Damage(repeated=1)),
        ([5, 7, 6, 8], Damage(changed=3)),
        ([5, 6, 8], Damage(lost=1, changed=1)),
        ([], Damage(lost=4)),
    ],
)
def test_tokens_shown_come_once_and_in_order(positions: list[int], damage: Damage) -> None:
    assert damage_shown(positions, 4) == damage


@pytest.mark.parametrize(
    ("tokens", "damage"),
    [
        ([1, 2, 3], Damage()),
        ([1, 2], Damage(lost=1)),
        ([1, 9, 3], Damage(changed=1)),
        ([1, 2, 2, 3], Damage(repeated=1, changed=1)),
    ],
)
def test_a_reference_answer_is_the_undisturbed_one(tokens: list[int], damage: Damage) -> None:
    assert damage_against([1, 2, 3], tokens) == damage


def test_trials_repeat_with_their_seed_and_strike_every_stage() -> None:
    def made(seed: int) -> list[Trial]:
        return seeded_trials(Fault.KILL, 30, seed=seed, stages=3, tokens=40, spacing_s=0.01)

    assert made(1) == made(1) != made(2)
    assert {trial.victim for trial in made(1)} == {0, 1, 2}
    assert all(0 < trial.after_tokens < 38 and 0 <= trial.delay_s < 0.01 for trial in made(1))
    assert len({trial.after_tokens for trial in made(1)}) > 10


def test_a_series_adds_up() -> None:
    trials = seeded_trials(Fault.KILL, 3, seed=1, stages=3, tokens=40, spacing_s=0.01)
    outcomes = (
        Outcome(trials[0], Damage(), 0.1, 0.5, ("rows",), {"load_s": 0.2}),
        Outcome(trials[1], Damage(changed=2), 0.3, 0.7, ("replay", "replay"), {"load_s": 0.4}),
        Outcome(trials[2], Damage(lost=9), None, None, problem="no plan"),
    )
    told = Series("stub", outcomes).to_dict()
    assert (told["lost"], told["repeated"], told["changed"]) == (9, 0, 2)
    assert (told["trials"], told["recovered"]) == (3, 2)
    assert told["ways"] == {"replay": 2, "rows": 1}
    assert told["detect_s"] == {"p50": 0.2, "p95": 0.3, "max": 0.3}
    assert told["parts"] == {"load_s": {"p50": 0.3, "p95": 0.4, "max": 0.4}}
    assert told["problems"] == ["no plan"]


def test_percentiles() -> None:
    assert percentiles([]) is None
    found = percentiles([float(n) for n in range(1, 101)])
    assert found == {"p50": 50.5, "p95": 95.0, "max": 100.0}
