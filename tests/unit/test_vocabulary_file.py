"""The vocabulary as a file of its own: llama.cpp spells every token as with the model's file."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest

from edgellm.api.schema import schema_grammar
from edgellm.engine.bindings import llama
from edgellm.engine.grammar import _words
from edgellm.engine.logprobs import top_logprobs
from edgellm.engine.sampling import LlamaSampler
from edgellm.errors import ModelFileError, StageError
from edgellm.modelfile.cut import write_shard
from edgellm.modelfile.model import open_model
from edgellm.modelfile.vocabulary import vocabulary_recipe
from edgellm.store.shards import ShardFiles, with_vocabulary
from edgellm.types import SamplerSettings

SCHEMA = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 3, "maxItems": 5}


def write(model: Path, destination: Path) -> Path:
    """The vocabulary file of a model. ``write_shard`` reads back a shard, which this is none."""
    opened = open_model(model)
    with pytest.raises(ModelFileError):
        write_shard(vocabulary_recipe(opened), opened.read, destination)
    return destination


def spelled(path: Path) -> tuple[list[bytes], list[bool]]:
    """Each token's bytes, and whether it ends an answer."""
    module = llama()
    _, vocabulary = _words(str(path))
    buffer = ctypes.create_string_buffer(1024)
    texts, ends = [], []
    for token in range(module.llama_vocab_n_tokens(vocabulary)):
        count = module.llama_token_to_piece(vocabulary, token, buffer, 1024, 0, True)
        texts.append(buffer.raw[:count])
        ends.append(bool(module.llama_vocab_is_eog(vocabulary, token)))
    return texts, ends


@pytest.mark.parametrize(
    "name",
    [None, *(pytest.param(each, marks=pytest.mark.models) for each in (
        "TinyStories-656K-q8_0.gguf", "stories260K-f32.gguf",
    ))],
)  # fmt: skip
def test_every_token_is_spelled_as_in_the_model(
    name: str | None, demo_model: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = demo_model if name is None else request.getfixturevalue("shared_models") / name
    made = write(model, tmp_path / "words.gguf")
    assert spelled(made) == spelled(model)
    assert made.stat().st_size < model.stat().st_size / 4


def test_that_of_another_model_is_refused(demo_model: Path, tmp_path: Path) -> None:
    made = write(demo_model, tmp_path / "words.gguf")
    files = ShardFiles(demo_model)
    digest = open_model(demo_model).digest
    assert with_vocabulary(files, made, digest).vocabulary == made
    assert with_vocabulary(files, None, digest) == files
    with pytest.raises(ModelFileError, match="another model"):
        with_vocabulary(files, made, "0f" * 32)


def test_a_shard_has_no_words(tmp_path: Path, demo_model: Path) -> None:
    from edgellm.modelfile.cut import cut
    from edgellm.types import LayerSpan

    model = open_model(demo_model)
    shard = cut(model, LayerSpan(4, 8), tmp_path / "shard.gguf").path
    settings = SamplerSettings(grammar='root ::= "a"')
    with pytest.raises(StageError, match="how tokens are spelled"):
        LlamaSampler(settings, 1024, str(shard))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_replay_draws_the_same_from_wherever_it_begins(
    demo_model: Path, temperature: float
) -> None:
    rows = np.random.default_rng(3).normal(size=(300, 1024)).astype(np.float32)
    texts, ends = spelled(demo_model)
    settings = SamplerSettings(
        temperature=temperature,
        seed=9,
        grammar=schema_grammar(SCHEMA, "schema"),
        grammar_from=2,
    )

    def draw(begin: list[int]) -> list[int]:
        sampler = LlamaSampler(settings, 1024, str(demo_model))
        history = list(begin)
        while len(history) < len(rows):
            token = sampler.sample(rows[len(history)], len(history), history)
            if ends[token]:
                sampler.close()
                return history
            history.append(token)
        raise AssertionError("it never ended")

    made = draw([5, 6])
    assert json.loads(b"".join(texts[token] for token in made[2:]))
    for begin in range(2, len(made), 3):
        assert draw(made[:begin]) == made


def test_log_probabilities_are_those_of_softmax() -> None:
    logits = np.random.default_rng(1).normal(size=500).astype(np.float32) * 4
    logits[7] = logits[9] = logits.max() + 1
    wanted = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    top = top_logprobs(logits, 3, 5)
    assert top.chosen == pytest.approx(wanted[3], abs=1e-9)
    assert top.tokens[:2] == (7, 9)  # equal ones in the order of their ids
    assert list(top.tokens) == sorted(range(500), key=lambda t: (-wanted[t], t))[:5]
    assert top.logprobs == pytest.approx([wanted[token] for token in top.tokens], abs=1e-9)
    assert top_logprobs(logits, 3, 0).tokens == ()
    assert len(top_logprobs(logits[:4], 3, 20).tokens) == 4
