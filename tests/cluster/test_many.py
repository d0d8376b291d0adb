"""32 requests at once over real stages, joining and leaving: in reference mode every bit is that of
the request alone in the whole model; in normal mode tokens differ only where two were as likely."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm.bench.agreement import Agreement, agreement, told
from edgellm.client import Completion, GenerateOptions, LoadedModel, LoadOptions
from edgellm.types import SamplerSettings
from tests.cluster.conftest import StartCluster
from tests.cluster.test_exact import CONTEXT, STORIES, Whole

pytestmark = pytest.mark.models

REQUESTS = 32
SLOTS = 8
CHUNK = 64
NEXT_TOKENS = 64
SMALL_GAP = 0.1
"""Of logits whose standard deviation is about 4: float16 keeps 11 bits of a row, and other kernels
sum in another order."""


def prompts(vocabulary: int) -> list[list[int]]:
    chance = random.Random(7)
    lengths = [chance.randint(1, 100) for _ in range(REQUESTS)]
    return [[1, *(chance.randrange(3, vocabulary) for _ in range(n))] for n in lengths]


def greedy(count: int) -> GenerateOptions:
    sampler = SamplerSettings(temperature=0.0)
    return GenerateOptions(
        max_tokens=count, sampler=sampler, ignore_eos=True, logits=True, reuse=False
    )


async def at_once(
    model: LoadedModel, prompts: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[Completion]:
    """They begin one after the other, quicker than they end; every fifth has a neighbour that is
    given up after some tokens."""
    chance = random.Random(3)

    async def one(prompt: Sequence[int], count: int, delay: float) -> Completion:
        await asyncio.sleep(delay)
        return await model.complete(list(prompt), greedy(count))

    tasks = [
        asyncio.create_task(one(prompt, count, chance.random() * 0.5))
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    given_up = [asyncio.create_task(one(each, 200, 0.0)) for each in prompts[::5]]
    await asyncio.sleep(0.3)
    for task in given_up:
        task.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    return await asyncio.gather(*tasks)


async def test_every_bit_is_that_of_each_alone(
    start_cluster: StartCluster, shared_models: Path
) -> None:
    path = shared_models / STORIES
    options = LoadOptions(stages="a:0-2,b:2-5", exact=True, context=CONTEXT, sequences=SLOTS)
    chance = random.Random(11)
    counts = [chance.randint(1, 40) for _ in range(REQUESTS)]
    async with start_cluster(2) as (cluster, _), cluster.load(str(path), options) as model:
        asked = prompts(model.opened.vocab)
        answers = await at_once(model, asked, counts)
    whole = Whole(path, CHUNK)
    try:
        for prompt, count, answer in zip(asked, counts, answers, strict=True):
            tokens, logits = whole.greedy(prompt, count)
            assert list(answer.tokens) == tokens
            assert (np.stack(answer.logits) == logits).all()
        _, moved = whole.greedy(asked[0], counts[0], shift=1)
        assert (np.stack(answers[0].logits) != moved).any(), "the comparison sees positions"
    finally:
        whole.close()


@pytest.mark.slow
async def test_in_batches_tokens_differ_only_where_two_are_as_likely(
    start_cluster: StartCluster, shared_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared_models / STORIES
    options = LoadOptions(stages="a:0-2,b:2-5", context=CONTEXT, sequences=SLOTS)
    found: list[Agreement] = []
    async with start_cluster(2) as (cluster, _), cluster.load(str(path), options) as model:
        asked = prompts(model.opened.vocab)
        answers = await at_once(model, asked, [NEXT_TOKENS] * REQUESTS)
        for prompt, answer in zip(asked, answers, strict=True):
            alone = await model.complete(prompt, greedy(NEXT_TOKENS))
            found.append(agreement(alone.tokens, alone.logits, answer.tokens))
    with capsys.disabled():
        print(told(found))
    assert all(each.tokens == NEXT_TOKENS for each in found)
    assert all(each.gap is None or each.gap < SMALL_GAP for each in found)
    assert sum(each.agreed for each in found) >= 0.8 * REQUESTS * NEXT_TOKENS


@pytest.mark.slow
async def test_answers_share_fewer_cells_than_they_could_fill(
    start_cluster: StartCluster, shared_models: Path
) -> None:
    """In llama.cpp's own memory: what no stage has room for is never sent there."""
    options = LoadOptions(stages="a:0-2,b:2-5", context=CONTEXT, sequences=6, cells=768)
    path = str(shared_models / STORIES)
    async with start_cluster(2) as (cluster, _), cluster.load(path, options) as model:
        asked = [each[:20] for each in prompts(model.opened.vocab)[:6]]
        answers = await asyncio.gather(*(model.complete(each, greedy(250)) for each in asked))
        assert [len(answer.tokens) for answer in answers] == [250] * 6
        alone = await model.complete(asked[0], greedy(32))
    assert agreement(alone.tokens, alone.logits, answers[0].tokens[:32]).agreed >= 16
