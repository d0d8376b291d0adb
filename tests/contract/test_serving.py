"""Many requests at once over one pipeline: the answers are those of each alone, steps are shared,
slots go to whoever is next, and nobody holds others up."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgellm.client import LoadedModel
from edgellm.engine.base import Decoded
from edgellm.engine.stub import StubEngine
from edgellm.errors import BusyError
from edgellm.runtime.pipeline import Pipeline
from edgellm.runtime.requests import Running
from edgellm.scheduler.batching import Part
from edgellm.transport.memory import MemoryNetwork
from tests.contract.test_pipeline import LAYERS, PROMPT, SPLITS, complete, greedy, loaded
from tests.contract.test_recovery import lose
from tests.inline import InlineCluster, inline_cluster, stub_answer, until

REQUESTS = 32


@contextlib.asynccontextmanager
async def serving(
    folder: Path, split: str = SPLITS[1], *, pace_s: float = 0.0, **options: Any
) -> AsyncIterator[tuple[InlineCluster, LoadedModel, MemoryNetwork]]:
    network = MemoryNetwork()
    count = split.count(",") + 1
    async with (
        inline_cluster(count, folder, network=network, pace_s=pace_s) as cluster,
        loaded(cluster, split, **options) as model,
    ):
        yield cluster, model, network


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Part]]:
    """The micro-batches that go out."""
    made: list[Sequence[Part]] = []
    send = Pipeline._send

    def noted(self: Pipeline, parts: Sequence[Part]) -> None:
        made.append(parts)
        send(self, parts)

    monkeypatch.setattr(Pipeline, "_send", noted)
    return made


def prompt_of(number: int, length: int) -> list[int]:
    return [(7 * number + 3 * at) % 251 for at in range(length)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("reuse", [True, False])
async def test_many_that_join_leave_and_are_given_up(
    tmp_path: Path, exact: bool, reuse: bool
) -> None:
    chance = random.Random(5)
    async with serving(tmp_path, SPLITS[4], exact=exact, sequences=8, chunk=16, pace_s=0.0005) as (
        cluster,
        model,
        _,
    ):

        async def one(number: int) -> None:
            await asyncio.sleep(chance.random() * 0.3)
            prompt = prompt_of(number, chance.randint(1, 90))
            count = chance.randint(1, 24)
            given_up = chance.randrange(count) if chance.random() < 0.25 else None
            options = greedy(count, priority=chance.randint(0, 1), reuse=reuse)
            made: list[int] = []
            pieces = model.answer(prompt, options).pieces()
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if given_up is not None and len(made) >= given_up:
                        break
                    if piece.made is not None:
                        made.append(piece.made.token)
            expected = stub_answer(prompt, LAYERS, count)
            assert made == expected[: len(made)]
            assert len(made) == count or given_up is not None

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))
        await until(lambda: cluster.resident == 0)
        assert model.pipeline.under_way == 0


async def test_streams_share_their_steps_and_every_stage_has_one(
    tmp_path: Path, sent: list[Sequence[Part]]
) -> None:
    async with serving(tmp_path, sequences=8, pace_s=0.002) as (_, model, _):
        answers = await asyncio.gather(
            *(complete(model, prompt_of(number, 8), count=30) for number in range(8))
        )
        for number, answer in enumerate(answers):
            assert list(answer.tokens) == stub_answer(prompt_of(number, 8), LAYERS, 30)
    # 8 chunks and 8 x 29 tokens: alone that would be 240 steps, in pairs of four it is about 60
    assert [len(parts) for parts in sent[-40:-8]] == [4] * 32
    assert len(sent) < 80


async def test_one_that_is_given_up_is_in_no_later_step(
    tmp_path: Path, sent: list[Sequence[Part]]
) -> None:
    async with serving(tmp_path, sequences=4, pace_s=0.002) as (cluster, model, _):
        tasks = [asyncio.create_task(complete(model, PROMPT[:n], count=40)) for n in (4, 5, 6, 7)]
        await until(lambda: cluster.stages["b"][0].tokens_out > 20)
        before = set(model.pipeline._running)
        tasks[2].cancel()
        await asyncio.wait([tasks[2]])
        (gone,) = before - set(model.pipeline._running)
        sent.clear()
        await asyncio.gather(*tasks[:2], tasks[3])
        after = {part.sequence for parts in sent for part in parts}
        assert after == before - {gone}
        await until(lambda: cluster.resident == 0)


async def test_a_slow_reader_holds_nobody_up(tmp_path: Path) -> None:
    async with serving(tmp_path, sequences=1) as (_, model, _):
        pieces = model.answer(PROMPT, greedy(20)).pieces()
        async with contextlib.aclosing(pieces):
            await anext(pieces)
            async with asyncio.timeout(5):
                other = await complete(model, PROMPT[:9])
            rest = [piece.made.token async for piece in pieces if piece.made is not None]
        assert list(other.tokens) == stub_answer(PROMPT[:9], LAYERS, 20)
        assert rest == stub_answer(PROMPT, LAYERS, 20)[1:]


@pytest.mark.parametrize("exact", [True, False])
async def test_an_urgent_request_takes_a_place_and_the_other_goes_on_later(
    tmp_path: Path, exact: bool
) -> None:
    async with serving(tmp_path, sequences=1, exact=exact, pace_s=0.001) as (cluster, model, _):
        patient = asyncio.create_task(complete(model, count=60))
        await until(lambda: cluster.stages["b"][0].tokens_out > 20)
        urgent = await complete(model, PROMPT[:9], count=10, priority=1)
        assert not patient.done()
        assert list(urgent.tokens) == stub_answer(PROMPT[:9], LAYERS, 10)
        assert list((await patient).tokens) == stub_answer(PROMPT, LAYERS, 60)
        await until(lambda: cluster.resident == 0)


async def test_too_many_are_refused_at_once_and_told_when_to_come_again(tmp_path: Path) -> None:
    async with serving(tmp_path, sequences=1, waiting=2, pace_s=0.001) as (cluster, model, _):
        tasks = [asyncio.create_task(complete(model, count=30)) for _ in range(8)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [each for each in done if isinstance(each, BusyError)]
        answered = [each for each in done if not isinstance(each, BaseException)]
        assert (len(answered), len(refused)) == (3, 5)
        assert all(error.retry_after_s >= 1 for error in refused)
        for answer in answered:
            assert list(answer.tokens) == stub_answer(PROMPT, LAYERS, 30)
        assert list((await complete(model, count=3)).tokens) == stub_answer(PROMPT, LAYERS, 3)
        await until(lambda: cluster.resident == 0)


@pytest.mark.parametrize("exact", [True, False])
async def test_a_loss_under_load_changes_no_answer(tmp_path: Path, exact: bool) -> None:
    async with serving(
        tmp_path, SPLITS[4], sequences=3, exact=exact, recover=True, pace_s=0.001
    ) as (cluster, model, network):
        lengths = range(3, 40, 4)
        tasks = [
            asyncio.create_task(complete(model, prompt_of(n, n), count=16, priority=n % 2))
            for n in lengths
        ]
        await until(lambda: cluster.stages["c"][0].tokens_out > 12)
        lose(network, "b")
        for length, answer in zip(lengths, await asyncio.gather(*tasks), strict=True):
            assert list(answer.tokens) == stub_answer(prompt_of(length, length), LAYERS, 16)
        await until(lambda: cluster.resident == 0)


async def test_one_that_ends_leaves_room_for_the_others_next_step(tmp_path: Path) -> None:
    async with serving(tmp_path, sequences=6, context=48, pace_s=0.001) as (cluster, model, _):
        prompts = [PROMPT[:37], *(PROMPT[:n] for n in range(2, 7))]
        answers = await asyncio.gather(*(complete(model, each, count=30) for each in prompts))
        assert len(answers[0].tokens) == 12  # its context is full
        for prompt, answer in list(zip(prompts, answers, strict=True))[1:]:
            assert list(answer.tokens) == stub_answer(prompt, LAYERS, 30)
        assert model.pipeline._batcher.in_flight == 0
        await until(lambda: cluster.resident == 0)


async def test_control_rows_that_go_astray_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison sees two streams whose tokens were exchanged."""
    send = Pipeline._send

    def astray(self: Pipeline, parts: Sequence[Part]) -> None:
        if len(parts) < 2 or parts[0].position != 13:
            send(self, parts)
            return
        one, other = (self._running[part.sequence].generation.tokens for part in parts)
        at, there = parts[0].position, parts[1].position
        one[at], other[there] = other[there], one[at]
        send(self, parts)
        one[at], other[there] = other[there], one[at]

    monkeypatch.setattr(Pipeline, "_send", astray)
    async with serving(tmp_path, SPLITS[0], sequences=2, pace_s=0.002) as (_, model, _):
        prompts = [prompt_of(number, 8) for number in range(2)]
        answers = await asyncio.gather(*(complete(model, each, count=10) for each in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = stub_answer(prompt, LAYERS, 10)
            assert list(answer.tokens)[:4] == expected[:4]
            assert list(answer.tokens) != expected


async def test_answers_that_outgrow_the_shared_memory_wait_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six answers of up to 5 pages in 12: stages never hold more, and some wait meanwhile."""
    preempted = 0
    most = 0
    preempt, decode = Running.preempt, StubEngine.decode

    def noted(self: Running) -> None:
        nonlocal preempted
        preempted += 1
        preempt(self)

    def measured(self: StubEngine, *arguments: Any) -> Decoded:
        nonlocal most
        decoded = decode(self, *arguments)
        most = max(most, sum(map(len, self._cells.values())))
        return decoded

    monkeypatch.setattr(Running, "preempt", noted)
    monkeypatch.setattr(StubEngine, "decode", measured)
    async with serving(tmp_path, sequences=6, cells=768, chunk=64, pace_s=0.0005) as (
        cluster,
        model,
        _,
    ):
        answers = await asyncio.gather(
            *(complete(model, prompt_of(n, 20 + 9 * n), count=180) for n in range(6))
        )
        for number, answer in enumerate(answers):
            expected = stub_answer(prompt_of(number, 20 + 9 * number), LAYERS, 180)
            assert list(answer.tokens) == expected
        later = await complete(model, prompt_of(9, 200), count=40)
        assert list(later.tokens) == stub_answer(prompt_of(9, 200), LAYERS, 40)
        await until(lambda: cluster.resident == 0)
    assert preempted
    assert 500 < most <= 768
