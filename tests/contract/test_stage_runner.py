"""Sequences over real engines: what ``engine.runner`` makes of steps, for every engine.

Above all: rows of several sequences in one step come back as each sequence's own, whatever the
engine does with them on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgellm.engine.base import Float32
from edgellm.errors import EdgeError, StageError
from edgellm.types import Mode, SamplerSettings
from edgellm.wire.messages import Row
from tests.stages import (
    GREEDY,
    KINDS,
    SPLITS,
    Stages,
    layers_of,
    open_stages,
    prompt_of,
    settings_of,
)

UNEQUAL = {1: 5, 2: 2, 3: 1}
ROUNDS = (UNEQUAL, {1: 1, 2: 1, 3: 1}, {3: 4, 1: 1, 2: 3}, {2: 1, 3: 1})


def two_stages(kind: str) -> list[tuple[int, int]]:
    cut = SPLITS[kind][1][0]
    return [(0, cut), (cut, layers_of(kind))]


def run_rounds(stages: Stages, wanted: tuple[int, ...]) -> dict[tuple[int, int], Float32]:
    """The rounds for some of the sequences: logits by (round, sequence). Tokens are fixed."""
    prompts = {sequence: prompt_of("llama", 32, seed=sequence) for sequence in UNEQUAL}
    if stages.vocabulary < 288:
        prompts = {s: [token % stages.vocabulary for token in p] for s, p in prompts.items()}
    for sequence in wanted:
        stages.open(sequence, prompts[sequence])
    found: dict[tuple[int, int], Float32] = {}
    for number, counts in enumerate(ROUNDS):
        given: Mapping[int, list[int]] = {
            s: prompts[s][stages.positions[s] :][:count]
            for s, count in counts.items()
            if s in wanted
        }
        if given:
            step = stages.step(given)
            assert not step.failures
            assert step.logits.keys() == given.keys()
            found.update({(number, s): row for s, row in step.logits.items()})
    for sequence in wanted:
        stages.close(sequence)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_unequal_sequences_come_back_in_order_bit_for_bit(kind: str, model_dir: Path) -> None:
    """Reference mode (a KV cache that is split by sequence), 5 + 2 + 1 tokens in one step."""
    with open_stages(kind, two_stages(kind), settings_of(), model_dir) as stages:
        together = run_rounds(stages, (1, 2, 3))
        alone = {}
        for sequence in (1, 2, 3):
            alone.update(run_rounds(stages, (sequence,)))
        assert together.keys() == alone.keys()
        for key, row in together.items():
            assert np.array_equal(row, alone[key]), key
        # negative controls: another sequence's row is another, and so is a permuted step's
        assert not np.array_equal(alone[0, 1], alone[0, 2])
        stages.permute = True
        assert not np.array_equal(run_rounds(stages, (1, 2, 3))[3, 2], together[3, 2])


def distance(one: Float32, other: Float32) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_unequal_sequences_come_back_in_order_in_normal_mode(
    kind: str, model_dir: Path
) -> None:
    """Not bit for bit: rows that share a call are summed in another order (float32 rounding, some
    1e-6 of the largest value) and read f16 cells of a shared cache (2**-11 = 5e-4), which a few
    random layers amplify to well under 2 %. Logits of other tokens are some 100 % away, which the
    control below shows with a tolerance that is ten times wider."""
    settings = settings_of(Mode.NORMAL)
    with open_stages(kind, two_stages(kind), settings, model_dir) as stages:
        together = run_rounds(stages, (1, 2, 3))
        alone = {}
        for sequence in (1, 2, 3):
            alone.update(run_rounds(stages, (sequence,)))
        for key, row in together.items():
            assert distance(row, alone[key]) < 0.02, key
        assert distance(alone[0, 1], alone[0, 2]) > 0.2
        assert distance(alone[0, 2], alone[0, 3]) > 0.2
        stages.permute = True
        wrong = run_rounds(stages, (1, 2, 3))
        assert distance(wrong[0, 1], alone[0, 1]) > 0.2
        assert distance(wrong[0, 2], alone[0, 2]) > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_interleaved_sequences_give_the_tokens_they_give_alone(kind: str, model_dir: Path) -> None:
    prompts = {s: prompt_of(kind, 3 + 4 * s, seed=s) for s in (1, 2, 3, 4)}
    count = 12
    with open_stages(kind, two_stages(kind), settings_of(), model_dir) as stages:
        alone = {s: stages.generate(s, prompt, count) for s, prompt in prompts.items()}
        assert len({tuple(tokens) for tokens in alone.values()}) == 4
        made: dict[int, list[int]] = {s: [] for s in prompts}
        while any(len(tokens) < count for tokens in made.values()):
            for sequence, prompt in prompts.items():  # a new one joins at each round
                if sequence not in stages.positions:
                    stages.open(sequence, prompt)
                    step = stages.step({sequence: prompt[:16]}, output=len(prompt) <= 16)
                    if len(prompt) > 16:
                        step = stages.step({sequence: prompt[16:]})
                    made[sequence].append(step.tokens[sequence])
                    break
            step = stages.step({s: made[s][-1:] for s in reversed(list(stages.positions))})
            for sequence, token in step.tokens.items():
                made[sequence].append(token)
        for sequence, tokens in alone.items():
            assert made[sequence][:count] == tokens


@pytest.mark.parametrize("known", [0, 1, 7, 11])
def test_a_replay_samples_what_was_sampled(known: int, model_dir: Path) -> None:
    """Reopened with the journal so far, chunks and single tokens as before: the same tokens go on,
    although penalties look at the history and the temperature is high."""
    sampler = SamplerSettings(temperature=1.5, seed=9, repeat_penalty=1.5, presence_penalty=1.0)
    prompt = prompt_of("llama", 9)
    count = 12

    def run(stages: Stages, journal: list[int]) -> list[int]:
        stages.open(1, prompt + journal, sampler)
        made = [stages.step({1: prompt}).tokens[1]]
        while len(made) < count:
            made.append(stages.step({1: made[-1:]}).tokens[1])
        stages.close(1)
        return made

    with open_stages("llama", two_stages("llama"), settings_of(), model_dir) as stages:
        first = run(stages, [])
        assert run(stages, first[:known]) == first
        # negative control: another history, other penalties
        assert run(stages, [token + 1 for token in first]) != first


# --- what is refused, and what is harmless --------------------------------------------


def failure_of(stages: Stages, row: Row) -> EdgeError | None:
    ids = np.full(row.count, 5, np.int32)
    failures = [
        error
        for outcome in stages.runners[0].step((row,), ids, None)
        for sequence, error in outcome.failures
        if sequence == row.sequence
    ]
    return failures[0] if failures else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row(1, 5, 1, True), "position 5 arrived, 4 was expected"),
        (Row(1, 2, 4, True), "position 2 arrived, 4 was expected"),
        (Row(1, 4, 17, True), "a chunk of 17 tokens is over the limit 16"),
    ],
)
def test_a_row_that_does_not_follow_ends_its_sequence_alone(
    kind: str, row: Row, words: str, model_dir: Path
) -> None:
    with open_stages(kind, [(0, layers_of(kind))], settings_of(), model_dir) as stages:
        prompt = prompt_of(kind, 8)
        expected = stages.generate(2, prompt, 4)
        stages.open(1, prompt)
        stages.step({1: prompt[:4]})
        stages.open(2, prompt)
        first = stages.step({2: prompt}).tokens[2]
        error = failure_of(stages, row)
        assert isinstance(error, StageError)
        assert words in error.message
        # the sequence is gone, the other goes on, and the slot can be had again
        assert failure_of(stages, Row(1, 4, 1, True)) is None
        second = stages.step({2: [first]}).tokens[2]
        assert [first, second] == expected[:2]
        stages.open(1, prompt)
        assert stages.generate(3, prompt, 4) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", Mode)
def test_the_context_is_full_at_its_last_token_and_not_before(
    kind: str, mode: Mode, model_dir: Path
) -> None:
    settings = settings_of(mode, context=40, sequences=2)
    prompt = prompt_of(kind, 40)
    with open_stages(kind, [(0, layers_of(kind))], settings, model_dir) as stages:
        for sequence in (1, 2):  # both may be full at once
            stages.open(sequence, prompt)
            for begin in (0, 16):
                stages.step({sequence: prompt[begin : begin + 16]}, output=False)
            step = stages.step({sequence: prompt[32:]})
            assert step.tokens[sequence] >= 0
        step = stages.step({1: [5]})
        assert "context of 40 tokens is full" in step.failures[1].message
        assert not step.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_and_unknown_rows_are_dropped(kind: str, model_dir: Path) -> None:
    with open_stages(kind, two_stages(kind), settings_of(), model_dir) as stages:
        prompt = prompt_of(kind, 9)
        expected = stages.generate(1, prompt, 5)
        stages.open(1, prompt)
        tokens = [stages.step({1: prompt}).tokens[1]]
        while len(tokens) < 5:
            tokens.append(stages.step({1: tokens[-1:]}).tokens[1])
            at = stages.positions[1]
            for row in (
                Row(1, at - 1, 1, True),
                Row(1, 0, 9, True),
                Row(77, 0, 3, True),
                Row(77, at, 1, True),
            ):
                ids = np.full(row.count, 5, np.int32)
                assert list(stages.runners[0].step((row,), ids, None)) == []
        assert tokens == expected


@pytest.mark.parametrize("kind", KINDS)
def test_slots_run_out_and_come_back(kind: str, model_dir: Path) -> None:
    settings = settings_of(sequences=2)
    with open_stages(kind, two_stages(kind), settings, model_dir) as stages:
        prompt = prompt_of(kind, 9)
        expected = stages.generate(1, prompt, 5)
        for number in range(10, 16):  # more sequences in turn than there are slots
            assert stages.generate(number, prompt, 5) == expected
        stages.open(1, prompt)
        stages.open(2, prompt)
        runner = stages.runners[0]
        with pytest.raises(StageError, match="all 2 sequences of this stage are in use"):
            runner.open(3, GREEDY, prompt, False)
        with pytest.raises(StageError, match="sequence 2 is already open"):
            runner.open(2, GREEDY, prompt, False)
        stages.step({2: prompt_of(kind, 9, seed=5)})
        stages.close(2)
        stages.close(2)  # twice is harmless, and frees one slot only
        assert stages.generate(3, prompt, 5) == expected
        stages.open(4, prompt)
        with pytest.raises(StageError, match="all 2 sequences"):
            runner.open(5, GREEDY, prompt, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_larger_than_a_call_is_divided(kind: str, model_dir: Path) -> None:
    """Four sequences of 9 tokens, 16 a call: nothing is lost and nothing is mixed up."""
    prompts = {s: prompt_of(kind, 9, seed=s) for s in (1, 2, 3, 4)}
    for mode in Mode:
        with open_stages(kind, two_stages(kind), settings_of(mode), model_dir) as stages:
            first = {s: stages.generate(s, prompt, 1) for s, prompt in prompts.items()}
            for sequence, prompt in prompts.items():
                stages.open(sequence, prompt)
            step = stages.step(prompts)
            assert {s: [token] for s, token in step.tokens.items()} == first
            assert stages.runners[0].figures.tokens == 4 * 9 * 2
