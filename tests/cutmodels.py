"""Any GGUF, cut and run in our engine's stages, beside the same calls to the whole model.

What the contract tests of quantisation, adapters and RoPE scaling share. It starts no process and
opens no socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.engine.base import Float32, StageConfig
from edgellm.engine.runner import StageRunner
from edgellm.engine.stage_main import ENGINES
from edgellm.modelfile import open_model, read_card
from edgellm.modelfile.architectures import architecture_rule
from edgellm.modelfile.cut import cut, write_embedding, write_recipe
from edgellm.modelfile.lora import adapter_recipe, embedding_adapter_recipe, open_adapter
from edgellm.modelfile.recipe import embedding_scale
from edgellm.store.shards import ShardFiles, with_adapters
from edgellm.types import EngineSettings, LayerSpan
from tests.reference import FloatRows, WholeModel
from tests.stages import Stages

CHUNK = 8
PROMPT = 16
STEPS = 8
CONTEXT = 64


@dataclass(frozen=True)
class Calls:
    """What the whole model was given, call by call, and its logits [vocabulary] after each."""

    calls: tuple[tuple[int, ...], ...]
    logits: tuple[FloatRows, ...]


def whole_calls(
    path: Path,
    *,
    prompt: int = PROMPT,
    chunk: int = CHUNK,
    context: int = CONTEXT,
    steps: int = STEPS,
    fields: Mapping[str, Any] | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
) -> Calls:
    """A random prompt in chunks and greedy decode steps, straight on llama.cpp."""
    with WholeModel(path, chunk=chunk, context=context, fields=fields, adapters=adapters) as whole:
        tokens = np.random.default_rng(1).integers(3, whole.vocabulary, prompt).tolist()
        calls = [tuple(tokens[at : at + chunk]) for at in range(0, prompt, chunk)]
        logits: list[FloatRows] = []
        position = 0
        for call in calls:
            logits.append(whole.decode(call, position)[0])
            position += len(call)
        for _ in range(steps):
            calls.append((int(logits[-1].argmax()),))
            logits.append(whole.decode(calls[-1], position)[0])
            position += 1
    return Calls(tuple(calls), tuple(logits))


@contextmanager
def open_cut(
    path: Path,
    spans: Sequence[tuple[int, int]],
    settings: EngineSettings,
    folder: Path,
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    checked: bool = True,
) -> Iterator[Stages]:
    """The stages ``spans`` of the model at ``path``, loaded; files are written to ``folder``.

    ``checked`` is False for adapters that are handed to the engine as they are.
    """
    card = read_card(path)
    runners = []
    try:
        for each in spans:
            span = LayerSpan(*each)
            config = _config(path, span, settings, folder)
            if checked:
                config = _with_adapters(config, path, folder, adapters)
            else:
                held = tuple((str(file), scale) for file, scale in adapters)
                config = replace(config, adapters=held)
            make_engine, make_sampler = ENGINES["llama"]
            runners.append(StageRunner(make_engine(config), config, make_sampler))
        yield Stages(runners, card.n_vocab)
    finally:
        for runner in runners:
            runner.engine.close()


def _config(
    path: Path,
    span: LayerSpan,
    settings: EngineSettings,
    folder: Path,
) -> StageConfig:
    model = open_model(path)
    card = read_card(model)
    shard = cut(model, span, folder / f"{span.first}-{span.end}.gguf")
    several = len(span) < model.layers
    embedding = folder / "embedding.gguf"
    return StageConfig(
        engine="llama",
        span=span,
        layers=model.layers,
        width=card.n_embd,
        vocab=card.n_vocab,
        settings=settings,
        shard=str(shard.path),
        embedding=str(write_embedding(model, embedding)) if several and shard.first else "",
        residual=shard.residual_node,
        input_node=shard.input_node or "",
        fed_tokens=shard.fed_tokens,
        embedding_scale=embedding_scale(model, architecture_rule(model.architecture)),
    )


def _with_adapters(
    config: StageConfig, path: Path, folder: Path, adapters: Sequence[tuple[Path, float]]
) -> StageConfig:
    """With the parts of ``adapters`` that belong to its span, cut and checked as on a device."""
    model, span = open_model(path), config.span
    digests: list[str] = []
    parts: dict[str, dict[int, Path]] = {"lora": {}, "lookup": {}}
    for number, (file, _) in enumerate(adapters):
        adapter = open_adapter(file, model)
        digests.append(adapter.digest)
        recipes = {"lora": adapter_recipe(adapter, model, span)}
        if config.embedding:
            recipes["lookup"] = embedding_adapter_recipe(adapter, model)
        for role, recipe in recipes.items():
            if recipe is not None:
                part = folder / f"{span.first}-{span.end}-{role}{number}.gguf"
                parts[role][number] = write_recipe(recipe, adapter.source.read, part)
    files = ShardFiles(Path(config.shard), Path(config.embedding) if config.embedding else None)
    files = with_adapters(files, parts["lora"], parts["lookup"], digests)
    return replace(
        config,
        adapters=tuple((str(p), adapters[n][1]) for n, p in sorted(files.adapters.items())),
        embedding_adapters=tuple(
            (str(p), adapters[n][1]) for n, p in sorted(files.embedding_adapters.items())
        ),
    )


def logits_of(stages: Stages, calls: Sequence[Sequence[int]]) -> list[Float32]:
    """Logits [vocabulary] after each call, of a new sequence that is then closed."""
    stages.open(1, [token for call in calls for token in call])
    try:
        return [stages.step({1: call}).logits[1].copy() for call in calls]
    finally:
        stages.close(1)
