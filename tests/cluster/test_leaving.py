"""A device that leaves on purpose with 300 tokens of context: nothing is computed twice, and no
more than the KV cells travels.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edgellm.client import Cluster
from edgellm.modelfile import read_card
from edgellm.modelref import open_reference
from tests.cluster.test_recovery import (
    OF_EACH,
    STORIES,
    answer,
    at,
    greedy,
    joined,
    options,
    same,
)
from tests.inline import COORDINATOR

PROMPT = [5 + 7 * at % 400 for at in range(300)]
COUNT = 200
LEAVES_AT = 3


@pytest.mark.parametrize("device", OF_EACH)
async def test_nothing_is_computed_twice_and_only_cells_travel(
    shared_models: Path, tmp_path: Path, device: str
) -> None:
    opened = open_reference(str(shared_models / STORIES))
    async with (
        joined(tmp_path, "abcd") as devices,
        Cluster.connect(
            [each.address for each in devices.values()], home=tmp_path / COORDINATOR
        ) as cluster,
    ):
        async with cluster.load(opened, options()) as model:
            expected = await answer(model, PROMPT, greedy(COUNT))
        process = devices[device].process
        async with cluster.load(opened, options()) as model:
            made = await answer(model, PROMPT, greedy(COUNT), at(LEAVES_AT, process.terminate))
            same(made, expected)
            assert [recovery.kind for recovery in made.recoveries] == ["pages"]
            async with asyncio.timeout(10):
                await process.wait()
            stats = await model.pipeline.stats()
            stages = model.plan.stages
    new = next(index for index, stage in enumerate(stages) if stage.device == "d")
    computed = len(PROMPT) + len(made.tokens) - 1
    restored = stats[new]["restored_tokens"]
    assert restored >= len(PROMPT)
    for index, told in enumerate(stats):
        # What the one stage was given it did not compute; the others computed all of it, once.
        assert told["tokens"] == computed - (restored if index == new else 0)
    assert opened.model is not None
    cells = read_card(opened.model).kv_bytes_per_token("f16", stages[new].span)
    assert stats[new]["pages_bytes"] <= 1.1 * cells * restored
