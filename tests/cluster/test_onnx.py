"""ONNX models over real devices: bit for bit the whole model's, also when devices are killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm.client import GenerateOptions, LoadOptions
from edgellm.modelfile.onnx import open_onnx
from edgellm.runtime.session import Session
from tests.cluster.conftest import StartCluster
from tests.cluster.processes import stages_of
from tests.cluster.test_exact import PROMPTS, TOKENS
from tests.cluster.test_recovery import answer, at, greedy, kill, pid_of, same
from tests.onnxreference import WholeOnnx

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")
MODELS = ("TinyStories-656K-onnx", "TinyStories-656K-onnx-genai-int4")
SPLITS = ("a:0-2", "a:0-1,b:1-2")
CONTEXT = 256
TEXT = "Once upon a time"


def wanted(whole: WholeOnnx, prompt: Sequence[int]) -> tuple[list[int], np.ndarray]:
    whole.reset()
    rows = [whole.decode(prompt)[-1]]
    tokens = [int(rows[-1].argmax())]
    while len(tokens) < TOKENS:
        rows.append(whole.decode(tokens[-1:])[-1])
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.stack(rows)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
async def test_reference_mode_is_bit_identical_to_the_whole_model(
    name: str, split: str, shared_models: Path, start_cluster: StartCluster
) -> None:
    path = shared_models / name
    whole = WholeOnnx(path / "model.onnx")
    options = LoadOptions(stages=split, exact=True, context=CONTEXT)
    async with start_cluster(2) as (cluster, _), cluster.load(str(path), options) as model:
        for text in PROMPTS:
            prompt = await model.prompt_tokens(text, raw=True)
            tokens, logits = wanted(whole, prompt)
            made = await model.complete(prompt, greedy(TOKENS))
            assert list(made.tokens) == tokens, text
            assert np.array_equal(np.stack(made.logits), logits), text
        # negative control: the comparison sees another prompt
        changed = await model.complete([*prompt[:-1], prompt[-1] + 1], greedy(TOKENS))
        assert not np.array_equal(np.stack(changed.logits), logits)


@pytest.mark.parametrize("device", [pytest.param("a", marks=pytest.mark.slow), "b"])
@pytest.mark.parametrize("spare", [0, 1], ids=["no spare", "a spare"])
@pytest.mark.parametrize("name", MODELS)
async def test_a_device_killed_while_it_answers(
    name: str, spare: int, device: str, shared_models: Path, start_cluster: StartCluster
) -> None:
    path = str(shared_models / name)
    options = LoadOptions(stages=SPLITS[1], exact=True, context=CONTEXT)
    async with start_cluster(2 + spare) as (cluster, nodes):
        async with cluster.load(path, options) as model:
            expected = await answer(model, TEXT, greedy())
        async with cluster.load(path, options) as model:
            made = await answer(model, TEXT, greedy(), at(30, lambda: kill(nodes, device)))
            same(made, expected)
            (recovery,) = made.recoveries
            assert (recovery.device, recovery.tier) == (device, "B")
            assert device not in [stage.device for stage in made.plan.stages]
            same(await answer(model, TEXT, greedy()), expected)
        # negative control: another beginning goes on otherwise
        async with cluster.load(path, LoadOptions(exact=True, context=CONTEXT)) as model:
            other = await answer(model, f"{TEXT} two", greedy())
            assert other.tokens != expected.tokens


async def test_a_stage_process_killed_is_started_again(
    shared_models: Path, start_cluster: StartCluster
) -> None:
    path = str(shared_models / MODELS[1])
    options = LoadOptions(stages=SPLITS[1], exact=True, context=CONTEXT)
    async with start_cluster(2) as (cluster, nodes), cluster.load(path, options) as model:
        expected = await answer(model, TEXT, greedy())

        def crash() -> None:
            (stage,) = stages_of(pid_of(nodes, "b"))
            stage.kill()

        same(await answer(model, TEXT, greedy(), at(30, crash)), expected)


async def test_normal_mode_with_several_at_once(
    shared_models: Path, start_cluster: StartCluster
) -> None:
    """Float16 rows between the devices; answers together are those of each alone."""
    path = str(shared_models / MODELS[0])
    options = LoadOptions(stages=SPLITS[1], context=CONTEXT, sequences=3)
    asked = GenerateOptions(max_tokens=30, raw=True, ignore_eos=True)
    async with start_cluster(2) as (cluster, _), cluster.load(path, options) as model:
        alone = [await model.complete(text, asked) for text in PROMPTS[:3]]
        under_way = [model.answer(text, asked) for text in PROMPTS[:3]]
        pieces = [one.pieces() for one in under_way]
        for _ in range(200):
            for each in pieces:
                await anext(each, None)
        together = [one.completion() for one in under_way]
        assert [one.tokens for one in together] == [one.tokens for one in alone]
        assert len({one.tokens for one in together}) == 3


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
async def test_devices_without_the_model_fetch_what_they_need(
    name: str,
    split: str,
    shared_models: Path,
    start_cluster: StartCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The devices seem to be on other machines: no path is told, and every byte goes over TCP."""
    path = shared_models / name
    options = LoadOptions(stages=split, exact=True, context=CONTEXT)
    async with start_cluster(2) as (cluster, _):
        async with cluster.load(str(path), options) as model:
            expected = await answer(model, TEXT, greedy())
        monkeypatch.setattr(Session, "local", property(lambda session: False))
        held = open_onnx(path)
        async with cluster.load(str(path), options) as model:
            same(await answer(model, TEXT, greedy()), expected)
            for stage, figures in zip(model.plan.stages, model.pipeline.loads, strict=True):
                # equal tensors count once; the load before left shards, but for the whole model's,
                # which was loaded as it lies on the disk
                needed = {held.read(weight.key) for weight in held.stage(stage.span).weights}
                fetched, had = figures["fetched_bytes"], figures["local_bytes"]
                assert fetched + had == sum(map(len, needed))
                assert (fetched > 0) is (len(stage.span) == held.layers)
