"""The sampler in numpy: against llama.cpp's, setting by setting, and replays that agree."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from numpy.typing import NDArray

from edgellm.engine.plainsampling import PlainSampler, position_fraction
from edgellm.engine.sampling import LlamaSampler
from edgellm.errors import StageError
from edgellm.types import SamplerSettings

VOCABULARY = 50
DRAWS = 3000


def logits_of(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32) * 2


LIKELY = [int(token) for token in np.argsort(-logits_of(1))[:4]]
HISTORY = [LIKELY[0], LIKELY[2], LIKELY[0], LIKELY[3], 49, LIKELY[1], LIKELY[0], LIKELY[2]]
CHANGES: list[dict[str, object]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"repeat_penalty": 1.8},
    {"presence_penalty": 1.0, "frequency_penalty": 0.7},
    {"repeat_penalty": 1.8, "penalty_last_n": 3},
    {"logit_bias": ((4, 3.0), (9, -100.0))},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.1},
]


def settings(**changes: object) -> SamplerSettings:
    plain: dict[str, object] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return SamplerSettings(**{**plain, **changes})  # type: ignore[arg-type]


def shares(sampler: PlainSampler | LlamaSampler, logits: NDArray[np.float32]) -> Counter[int]:
    return Counter(sampler.sample(logits, position, HISTORY) for position in range(DRAWS))


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_it_draws_as_often_as_llama_cpp(changes: dict[str, object]) -> None:
    """Two samples of 3,000: shares differ by sqrt(2 p (1 - p) / 3000), so 0.06 is over four
    deviations of the likeliest. Tokens that one filter drops, the other drops too."""
    logits = logits_of(1)
    mine = shares(PlainSampler(settings(**changes), VOCABULARY), logits)
    theirs = shares(LlamaSampler(settings(**changes), VOCABULARY), logits)
    for token in range(VOCABULARY):
        assert abs(mine[token] - theirs[token]) / DRAWS < 0.06
        if min(mine[token], theirs[token]) == 0:
            assert max(mine[token], theirs[token]) < 12
    if changes:  # negative control: the setting does something
        plain = shares(PlainSampler(settings(), VOCABULARY), logits)
        assert any(abs(mine[t] - plain[t]) / DRAWS >= 0.06 for t in range(VOCABULARY))


def test_greedy_is_the_largest_logit_after_penalties() -> None:
    logits = logits_of(2)
    best = int(np.argmax(logits))
    sampler = PlainSampler(settings(temperature=0.0), VOCABULARY)
    assert sampler.sample(logits, 1, HISTORY) == best
    sampler = PlainSampler(settings(temperature=0.0, presence_penalty=50.0), VOCABULARY)
    assert sampler.sample(logits, 1, [best]) != best
    before = logits.copy()
    sampler.sample(logits, 1, [best])
    assert np.array_equal(before, logits)


def test_the_token_is_a_function_of_seed_and_position() -> None:
    logits = logits_of(3)
    one, other = (PlainSampler(settings(seed=seed), VOCABULARY) for seed in (7, 8))
    tokens = [one.sample(logits, position, []) for position in range(100)]
    assert [one.sample(logits, position, []) for position in range(100)] == tokens
    assert [other.sample(logits, position, []) for position in range(100)] != tokens
    assert position_fraction(1, 2) == 0.9826670635163017
    assert all(0 <= position_fraction(5, position) < 1 for position in range(1000))


def test_what_is_no_number_is_refused() -> None:
    logits = logits_of(4)
    logits[7] = np.nan
    with pytest.raises(StageError, match="not numbers"):
        PlainSampler(settings(), VOCABULARY).sample(logits, 0, [])
    with pytest.raises(StageError, match="logit_bias"):
        PlainSampler(settings(logit_bias=((VOCABULARY, 1.0),)), VOCABULARY)
