"""A cluster in one process, over memory and over TCP: right answers, and requests that end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from edgellm.client import Completion, GenerateOptions, LoadedModel, LoadOptions
from edgellm.errors import DeadlineError, UsageError
from edgellm.transport.memory import Link, MemoryNetwork
from edgellm.types import FinishReason, SamplerSettings
from tests.inline import InlineCluster, inline_cluster, stub_answer, until

LAYERS = 6
PROMPT = list(range(3, 40))
StartInline = Callable[..., AbstractAsyncContextManager[InlineCluster]]

SPLITS = (
    "a:0-6",
    "a:0-1,b:1-6",
    "a:0-5,b:5-6",
    "b:0-3,a:3-6",
    "a:0-2,b:2-4,c:4-6",
    "c:0-1,a:1-2,b:2-6",
    "a:0-1,b:1-3,c:3-4,d:4-6",
)


@pytest.fixture(params=["memory", "tcp"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> StartInline:
    """``async with start(3) as cluster``: devices a, b, c over either transport."""

    def begin(count: int, **more: Any) -> AbstractAsyncContextManager[InlineCluster]:
        network = MemoryNetwork() if request.param == "memory" else None
        return inline_cluster(count, tmp_path, network=network, **more)

    return begin


@pytest.fixture
def start_in_memory(tmp_path: Path) -> StartInline:
    def begin(count: int, **more: Any) -> AbstractAsyncContextManager[InlineCluster]:
        return inline_cluster(count, tmp_path, network=MemoryNetwork(), **more)

    return begin


@contextlib.asynccontextmanager
async def loaded(
    cluster: InlineCluster, stages: str, *, model: str = f"stub:{LAYERS}", **options: Any
) -> AsyncIterator[LoadedModel]:
    """Without recovery: what becomes of a loss by itself. ``test_recovery`` has what follows."""
    options = {"chunk": 8, "sequences": 4, "context": 256, "recover": False, **options}
    async with cluster.client.load(model, LoadOptions(stages=stages, **options)) as made:
        yield made


def greedy(count: int = 20, **more: Any) -> GenerateOptions:
    return GenerateOptions(
        max_tokens=count, sampler=SamplerSettings(temperature=0.0), raw=True, **more
    )


async def complete(model: LoadedModel, prompt: list[int] | None = None, **more: Any) -> Completion:
    return await model.complete(PROMPT if prompt is None else prompt, greedy(**more))


# --- right answers --------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("exact", [True, False])
async def test_any_split_gives_the_oracle_s_tokens(
    start: StartInline, split: str, exact: bool
) -> None:
    async with (
        start(split.count(",") + 1) as cluster,
        loaded(cluster, split, exact=exact) as model,
    ):
        for length in (1, 7, 8, 9, 37):
            answer = await complete(model, PROMPT[:length])
            assert list(answer.tokens) == stub_answer(PROMPT[:length], LAYERS, 20)
            assert answer.finish_reason is FinishReason.LENGTH


def test_the_oracle_sees_every_token_and_every_layer() -> None:
    """Negative controls: an answer from a changed prompt, order or depth is another answer."""
    right = stub_answer(PROMPT, LAYERS, 20)
    assert stub_answer(PROMPT[1:], LAYERS, 20) != right
    assert stub_answer([PROMPT[1], PROMPT[0], *PROMPT[2:]], LAYERS, 20) != right
    assert stub_answer(PROMPT, LAYERS - 1, 20) != right
    assert stub_answer([*PROMPT[:-1], 200], LAYERS, 20) != right


async def test_concurrent_requests_do_not_mix(start: StartInline) -> None:
    prompts = [[seed, *PROMPT[: 3 * seed]] for seed in range(1, 11)]
    async with start(3) as cluster, loaded(cluster, SPLITS[4]) as model:
        # more than there are sequences: the rest wait for their turn
        answers = await asyncio.gather(*(complete(model, prompt) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list(answer.tokens) == stub_answer(prompt, LAYERS, 20)
        await until(lambda: cluster.resident == 0)


async def test_a_full_context_ends_the_answer(start: StartInline) -> None:
    async with start(2) as cluster, loaded(cluster, SPLITS[1], context=40) as model:
        answer = await complete(model, count=50)
        assert list(answer.tokens) == stub_answer(PROMPT, LAYERS, 4)
        assert answer.finish_reason is FinishReason.LENGTH
        with pytest.raises(UsageError, match="the context holds 40"):
            await complete(model, [1] * 41)


async def test_delays_change_nothing(tmp_path: Path) -> None:
    network = MemoryNetwork(seed=3, link=Link(delay_s=0.002, jitter_s=0.004, bytes_per_s=1e6))
    async with (
        inline_cluster(3, tmp_path, network=network) as cluster,
        loaded(cluster, SPLITS[4]) as model,
    ):
        answers = await asyncio.gather(*(complete(model, PROMPT[:n]) for n in (5, 20, 37)))
        for length, answer in zip((5, 20, 37), answers, strict=True):
            assert list(answer.tokens) == stub_answer(PROMPT[:length], LAYERS, 20)


async def test_a_loaded_cluster_loads_again(start: StartInline) -> None:
    async with start(3) as cluster:
        for split in (SPLITS[4], SPLITS[5], SPLITS[1]):
            async with loaded(cluster, split) as model:
                answer = await complete(model)
                assert list(answer.tokens) == stub_answer(PROMPT, LAYERS, 20)
            await until(lambda: cluster.hosted == 0)
            await until(lambda: all(stage.ended for stage in cluster.all_stages))


async def test_two_models_at_once(start: StartInline) -> None:
    async with (
        start(2) as cluster,
        loaded(cluster, SPLITS[1]) as one,
        loaded(cluster, "b:0-2,a:2-4", model="stub:4") as other,
    ):
        first, second = await asyncio.gather(complete(one), complete(other))
        assert list(first.tokens) == stub_answer(PROMPT, LAYERS, 20)
        assert list(second.tokens) == stub_answer(PROMPT, 4, 20)


# --- requests that end early ----------------------------------------------------------


async def test_leaving_early_frees_the_slot_everywhere(start: StartInline) -> None:
    async with start(3) as cluster, loaded(cluster, SPLITS[4], sequences=1) as model:
        for taken in (1, 3, 0, 7):
            pieces = model.answer(PROMPT, greedy(10_000)).pieces()
            async with contextlib.aclosing(pieces):
                for _ in range(taken):
                    await anext(pieces)
                if taken:
                    assert cluster.resident == 3
            await until(lambda: cluster.resident == 0)
        answer = await complete(model)  # the one slot can be had again, and is empty
        assert list(answer.tokens) == stub_answer(PROMPT, LAYERS, 20)


async def test_a_cancelled_task_frees_the_slot_everywhere(start: StartInline) -> None:
    async with start(3, pace_s=0.002) as cluster, loaded(cluster, SPLITS[4]) as model:
        tasks = [asyncio.create_task(complete(model, count=200)) for _ in range(6)]
        await until(lambda: cluster.resident == 12)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        await until(lambda: cluster.resident == 0)
        answer = await complete(model)
        assert list(answer.tokens) == stub_answer(PROMPT, LAYERS, 20)


@pytest.mark.parametrize("begin", [0, 4, 11])
async def test_a_stop_string_ends_the_answer_before_it(start: StartInline, begin: int) -> None:
    tokens = stub_answer(PROMPT, LAYERS, 20)
    text = bytes(tokens).decode("utf-8", "replace")
    async with start(2) as cluster, loaded(cluster, SPLITS[1]) as model:
        whole = await complete(model)
        assert whole.text == text
        stop = text[begin : begin + 2]
        answer = await complete(model, stop=(stop, "never there"))
        assert answer.text == text[: text.index(stop)]
        assert answer.finish_reason is FinishReason.STOP
        assert list(answer.tokens) == tokens[: len(answer.tokens)]
        await until(lambda: cluster.resident == 0)


async def test_a_deadline_ends_the_request_and_frees_the_slots(start: StartInline) -> None:
    async with start(2, pace_s=0.01) as cluster, loaded(cluster, SPLITS[1]) as model:
        with pytest.raises(DeadlineError, match="within its deadline"):
            await complete(model, count=200, deadline_s=0.15)
        await until(lambda: cluster.resident == 0)
        answer = await complete(model, count=3)
        assert list(answer.tokens) == stub_answer(PROMPT, LAYERS, 3)


async def test_a_deadline_passes_while_waiting_for_a_slot(start: StartInline) -> None:
    async with (
        start(1, pace_s=0.01) as cluster,
        loaded(cluster, SPLITS[0], sequences=1) as model,
    ):
        first = asyncio.create_task(complete(model, count=40))
        await until(lambda: cluster.resident == 1)
        with pytest.raises(DeadlineError):
            await complete(model, deadline_s=0.05)
        assert list((await first).tokens) == stub_answer(PROMPT, LAYERS, 40)


async def test_a_deadline_is_told_to_a_reader_that_is_busy_elsewhere(
    start_in_memory: StartInline,
) -> None:
    """It arrives as the request's error, not as a cancellation of what the reader does."""
    async with (
        start_in_memory(1, pace_s=0.005) as cluster,
        loaded(cluster, SPLITS[0]) as model,
    ):
        pieces = model.answer(PROMPT, greedy(10_000, deadline_s=0.2)).pieces()
        shown = []
        with pytest.raises(DeadlineError):
            async for piece in pieces:
                shown.append(piece.made)
                if len(shown) == 1:
                    await asyncio.sleep(0.4)
        made = [each.token for each in shown if each is not None]
        assert made == stub_answer(PROMPT, LAYERS, len(made))
        await until(lambda: cluster.resident == 0)


async def test_devices_keep_the_deadline_themselves(start_in_memory: StartInline) -> None:
    """A coordinator that never closes its sequences loses them all the same."""
    async with start_in_memory(2) as cluster, loaded(cluster, SPLITS[1]) as model:
        pieces = model.answer(PROMPT, greedy(10_000, deadline_s=0.1)).pieces()
        async with contextlib.aclosing(pieces):
            await anext(pieces)
            assert cluster.resident == 2
            await until(lambda: cluster.resident == 0)


async def test_no_more_chunks_are_in_flight_than_stages_and_one(start: StartInline) -> None:
    prompt = [token % 250 for token in range(200)]
    async with start(3, pace_s=0.004) as cluster, loaded(cluster, SPLITS[4]) as model:
        task = asyncio.create_task(complete(model, prompt, count=5))
        most = 0
        while not task.done():
            (first,), (last,) = cluster.stages["a"], cluster.stages["c"]
            most = max(most, first.steps_in - last.tokens_out)
            await asyncio.sleep(0.001)
        assert list((await task).tokens) == stub_answer(prompt, LAYERS, 5)
    assert most == 4  # all of the window is used, so that the stages overlap, and no more


async def test_figures_of_one_request_are_its_own(start: StartInline) -> None:
    async with start(2) as cluster, loaded(cluster, SPLITS[1]) as model:
        for _ in range(2):
            answer = (await complete(model, count=5)).to_dict()
            timings = answer["timings"]
            assert (timings["prompt_tokens"], timings["completion_tokens"]) == (37, 5)
            assert [stage["tokens"] for stage in timings["stages"]] == [41, 41]
            links = {(each["from"], each["to"]): each for each in answer["wire"]["links"]}
            # 5 chunks of the prompt, 4 tokens, the opening of the sequence and its end; and echoes
            # that time the link, four a second at most
            assert 11 <= links["a", "b"]["messages"] <= 14
            assert answer["wire"]["returned_bytes_per_token"] <= 200


async def test_bad_requests_are_refused_before_they_are_sent(start: StartInline) -> None:
    async with start(2) as cluster, loaded(cluster, SPLITS[1]) as model:
        before = cluster.stages["a"][0].steps_in
        for prompt, options, words in (
            ([], {}, "the prompt is empty"),
            ([1, 256], {}, "outside 0 to 255"),
            ([-1], {}, "outside 0 to 255"),
            ([1], {"count": 0}, "at least one token"),
        ):
            with pytest.raises(UsageError, match=words):
                await complete(model, prompt, **options)
        for token in (-1, 256):
            biased = SamplerSettings(temperature=0.0, logit_bias=((token, 1.0),))
            with pytest.raises(UsageError, match="logit_bias names a token outside 0 to 255"):
                await model.complete([1], GenerateOptions(sampler=biased, raw=True))
        assert cluster.stages["a"][0].steps_in == before
        assert list((await complete(model)).tokens) == stub_answer(PROMPT, LAYERS, 20)
