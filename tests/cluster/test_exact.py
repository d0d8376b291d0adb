"""The exactness contract, over real processes and TCP, against llama.cpp running the whole model.

Bits are compared, not tolerances. Every claim has its negative control beside it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.answer import DEFAULT_CHUNK
from edgellm.client import Completion, GenerateOptions, LoadedModel, LoadOptions
from edgellm.types import RopeScaling, SamplerSettings
from tests.cluster.conftest import StartCluster
from tests.quantised import CONTEXT as TRAINED
from tests.quantised import quantise, write_wide_llama
from tests.reference import WholeModel
from tests.tinyadapters import write_adapter
from tests.unit.test_gguf_split import split as split_file

TOKENS = 200
CONTEXT = 512
PROMPTS = (
    "Once upon a time",
    "Lily and Tom went to the park",
    "The big dog was very",
    "One day, a little bird",
    "There was a boy who liked to",
    "Mom said that it was time",
    "In the forest, the bear",
    "The cat sat on the red",
    "A girl named Sue had a",
    "He was sad because his toy",
)
STORIES = "stories260K-f32.gguf"
TINY = "TinyStories-656K-q8_0.gguf"


class Whole:
    """The reference: greedy tokens and the logits of every step, of the undivided model."""

    def __init__(self, path: Path, chunk: int, **more: Any) -> None:
        self._model = WholeModel(path, chunk=chunk, context=CONTEXT, **more)

    def greedy(self, prompt: list[int], count: int, shift: int = 0) -> tuple[list[int], np.ndarray]:
        """``shift`` moves all positions by as much: wrong on purpose, for the controls."""
        model = self._model
        model.reset()
        logits = None
        for begin in range(0, len(prompt), model.chunk):
            logits = model.decode(prompt[begin : begin + model.chunk], begin + shift)
        assert logits is not None
        rows, tokens = [logits[0]], [int(np.argmax(logits[0]))]
        while len(tokens) < count:
            logits = model.decode([tokens[-1]], len(prompt) + len(tokens) - 1 + shift)
            rows.append(logits[0])
            tokens.append(int(np.argmax(logits[0])))
        return tokens, np.stack(rows)

    def close(self) -> None:
        self._model.close()


async def greedy(model: LoadedModel, prompt: list[int], count: int = TOKENS) -> Completion:
    return await model.complete(
        prompt,
        GenerateOptions(
            max_tokens=count,
            sampler=SamplerSettings(temperature=0.0),
            ignore_eos=True,
            logits=True,
        ),
    )


def split(stages: int, layers: int) -> str:
    """Stages as even as they can be: ``a:0-2,b:2-5``."""
    cuts = [round(index * layers / stages) for index in range(stages + 1)]
    return ",".join(f"{'abcde'[i]}:{cuts[i]}-{cuts[i + 1]}" for i in range(stages))


@pytest.mark.parametrize(
    ("file", "layers", "stages"),
    [
        pytest.param(STORIES, 5, 1, marks=pytest.mark.slow),
        (STORIES, 5, 2),
        pytest.param(STORIES, 5, 3, marks=pytest.mark.slow),
        (STORIES, 5, 5),
        (TINY, 2, 2),
    ],
)
async def test_reference_mode_is_bit_identical_to_the_whole_model(
    shared_models: Path, start_cluster: StartCluster, file: str, layers: int, stages: int
) -> None:
    path = shared_models / file
    options = LoadOptions(stages=split(stages, layers), exact=True, context=CONTEXT)
    whole = Whole(path, DEFAULT_CHUNK)
    async with start_cluster(stages) as (cluster, _), cluster.load(str(path), options) as model:
        for number, text in enumerate(PROMPTS):
            prompt = await model.prompt_tokens(text, raw=True)
            tokens, logits = whole.greedy(prompt, TOKENS)
            answer = await greedy(model, prompt)
            assert list(answer.tokens) == tokens, text
            assert np.array_equal(np.stack(answer.logits), logits), text
            if number == 0:  # negative control: the comparison sees positions off by one
                _, shifted = whole.greedy(prompt, TOKENS, shift=1)
                assert not np.array_equal(np.stack(answer.logits), shifted)
    whole.close()


async def test_a_prompt_in_several_chunks_is_bit_identical(
    shared_models: Path, start_cluster: StartCluster
) -> None:
    path = shared_models / STORIES
    options = LoadOptions(stages=split(3, 5), exact=True, context=CONTEXT, chunk=32)
    whole = Whole(path, 32)
    prompt = np.random.default_rng(7).integers(3, 512, 301).tolist()
    tokens, logits = whole.greedy(prompt, 20)
    async with start_cluster(3) as (cluster, _), cluster.load(str(path), options) as model:
        answer = await greedy(model, prompt, 20)
    assert list(answer.tokens) == tokens
    assert np.array_equal(np.stack(answer.logits), logits)
    # negative control: two tokens of the prompt change places
    prompt[3], prompt[4] = prompt[4], prompt[3]
    assert not np.array_equal(np.stack(answer.logits), whole.greedy(prompt, 20)[1])
    whole.close()


async def test_a_split_file_with_an_adapter_stretched_positions_and_small_cells(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    """All that changes how a model computes, at once, beyond the context that it was trained for;
    over two devices, and on one that reads the model's own file."""
    base = write_wide_llama(tmp_path)
    path = quantise(base, tmp_path, ["Q4_K_M"])["Q4_K_M"]
    parts = split_file(path, tmp_path)
    adapter = write_adapter(path, tmp_path / "adapter.gguf", outer=["output", "token_embd"])
    fields = {"rope_scaling_type": 2, "rope_freq_scale": 0.5, "type_k": 8, "type_v": 8}
    prompt = np.random.default_rng(3).integers(3, 288, TRAINED + 30).tolist()
    whole = Whole(path, DEFAULT_CHUNK, fields=fields, adapters=[(adapter, 0.5)])
    tokens, logits = whole.greedy(prompt, 5)
    whole.close()
    options = LoadOptions(
        stages="a:0-1,b:1-",
        exact=True,
        context=CONTEXT,
        kv_type="q8_0",
        rope_scaling=RopeScaling.YARN,
        rope_scale=2.0,
        lora=(f"{adapter}=0.5",),
    )
    async with start_cluster(2) as (cluster, _):
        for stages in ("a:0-1,b:1-", "a:0-4"):
            now = replace(options, stages=stages)
            async with cluster.load(str(parts[1]), now) as model:
                answer = await greedy(model, prompt, 5)
            assert list(answer.tokens) == tokens
            assert np.array_equal(np.stack(answer.logits), logits)
        # negative control: the same without the adapter
        async with cluster.load(str(parts[0]), replace(options, lora=())) as model:
            answer = await greedy(model, prompt, 5)
        assert not np.array_equal(answer.logits[0], logits[0])


async def test_normal_mode_gives_the_same_tokens_for_nine_of_ten_prompts(
    shared_models: Path, start_cluster: StartCluster
) -> None:
    path = shared_models / STORIES
    options = LoadOptions(stages=split(2, 5), context=CONTEXT)
    whole = Whole(path, DEFAULT_CHUNK)
    differing = []
    bits_differ = False
    async with start_cluster(2) as (cluster, _), cluster.load(str(path), options) as model:
        for text in PROMPTS:
            prompt = await model.prompt_tokens(text, raw=True)
            tokens, logits = whole.greedy(prompt, TOKENS)
            answer = await greedy(model, prompt)
            bits_differ |= not np.array_equal(np.stack(answer.logits), logits)
            if list(answer.tokens) != tokens:
                pairs = enumerate(zip(answer.tokens, tokens, strict=True))
                at = next(index for index, (ours, theirs) in pairs if ours != theirs)
                best = np.sort(logits[at])[-2:]
                differing.append(
                    f"{text!r}: from token {at}, best two {best[1] - best[0]:.2e} apart"
                )
    whole.close()
    print("normal mode:", 10 - len(differing), "of 10 identical;", "; ".join(differing))
    assert len(differing) <= 1, differing
    # negative control: float16 between the stages does change bits, so the exact tests above
    # would see it
    assert bits_differ
