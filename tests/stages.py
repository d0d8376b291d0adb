"""Stages for tests, of every engine: configurations, files, and runners in a row without a wire.

This file may load native code (the llama.cpp engine). It starts no process and opens no socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edgellm.engine.base import Float32, Int32, StageConfig, StageEngine
from edgellm.engine.outcome import Outcome
from edgellm.engine.runner import StageRunner
from edgellm.engine.stage_main import ENGINES
from edgellm.engine.stub import VOCABULARY as STUB_VOCABULARY
from edgellm.engine.stub import WIDTH as STUB_WIDTH
from edgellm.errors import EdgeError
from edgellm.modelfile import open_model
from edgellm.modelfile.architectures import architecture_rule
from edgellm.modelfile.cut import cut, write_embedding, write_shard
from edgellm.modelfile.onnx import onnx_recipe, open_onnx
from edgellm.modelfile.recipe import embedding_scale
from edgellm.types import Activations, EngineSettings, LayerSpan, Mode, SamplerSettings
from edgellm.wire.messages import Row
from tests.tinymodels import TINY_MODELS, VOCABULARY, WIDTH, write_tiny_model
from tests.tinyonnx import write_tiny_onnx

KINDS = ("stub", "llama", "lfm2", "onnx-plain", "onnx-grouped")
"""A stub, a plain transformer (head size 32), a hybrid of convolutions and attention; and ONNX
graphs of the two great exporters."""
SPLITS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "stub": ((0, 2), (2, 4), (4, 6)),
    "llama": ((0, 2), (2, 3), (3, 5)),
    "lfm2": ((0, 2), (2, 4), (4, 6)),
    "gemma3": ((0, 6), (6, 12), (12, 13)),
    "mamba": ((0, 1), (1, 2), (2, 4)),
    "qwen35": ((0, 2), (2, 4), (4, 6)),
    "onnx-plain": ((0, 2), (2, 3), (3, 5)),
    "onnx-grouped": ((0, 2), (2, 3), (3, 5)),
    "onnx-half": ((0, 2), (2, 3), (3, 5)),
    "onnx-conv": ((0, 2), (2, 3), (3, 5)),
}
"""Three stages of each kind. Beside ``KINDS``: sliding windows (the last stage has nothing else),
recurrent layers alone, and a hybrid of attention and recurrence with M-RoPE; of ONNX, float16 rows
of two tensors, and states of convolutions."""
GREEDY = SamplerSettings(temperature=0.0)


def layers_of(kind: str) -> int:
    return SPLITS[kind][-1][1]


def vocabulary_of(kind: str) -> int:
    return STUB_VOCABULARY if kind == "stub" else VOCABULARY


def settings_of(
    mode: Mode = Mode.REFERENCE,
    *,
    sequences: int = 4,
    context: int = 64,
    chunk: int = 16,
    kv_type: str = "f16",
) -> EngineSettings:
    exact = mode is Mode.REFERENCE
    return EngineSettings(
        context=context,
        sequences=sequences,
        chunk=chunk,
        kv_type=kv_type,
        mode=mode,
        activations=Activations.FLOAT32 if exact else Activations.FLOAT16,
        threads=1,
    )


def stage_config(
    kind: str, span: tuple[int, int], settings: EngineSettings, folder: Path
) -> StageConfig:
    """What a stage process is told; files are written to ``folder`` once."""
    layers = layers_of(kind)
    if kind == "stub":
        return StageConfig("stub", LayerSpan(*span), layers, STUB_WIDTH, STUB_VOCABULARY, settings)
    if kind.startswith("onnx-"):
        return _onnx_config(kind, LayerSpan(*span), settings, folder)
    path = folder / f"{kind}-{TINY_MODELS[kind].layers}.gguf"
    if not path.exists():
        write_tiny_model(kind, folder)
    whole = StageConfig(
        "llama", LayerSpan(*span), layers, WIDTH, VOCABULARY, settings, shard=str(path)
    )
    if span == (0, layers):
        return whole
    model = open_model(path)
    shard = cut(model, whole.span, folder / f"{kind}-{span[0]}-{span[1]}.gguf")
    return StageConfig(
        engine="llama",
        span=whole.span,
        layers=layers,
        width=WIDTH,
        vocab=VOCABULARY,
        settings=settings,
        shard=str(shard.path),
        embedding=str(write_embedding(model, folder / f"{kind}-embd.gguf")) if shard.first else "",
        residual=shard.residual_node,
        input_node=shard.input_node or "",
        fed_tokens=shard.fed_tokens,
        embedding_scale=embedding_scale(model, architecture_rule(model.architecture)),
    )


def _onnx_config(kind: str, span: LayerSpan, settings: EngineSettings, folder: Path) -> StageConfig:
    pytest.importorskip("onnxruntime")
    path = folder / kind / "model.onnx"
    if not path.exists():
        write_tiny_onnx(kind, folder / kind)
    model = open_onnx(path)
    if len(span) < model.layers:
        path = folder / f"{kind}-{span.first}-{span.end}.gguf"
        if not path.exists():
            write_shard(onnx_recipe(model, span), model.read, path)
    return StageConfig(
        "onnx", span, model.layers, model.width, model.vocab, settings, shard=str(path)
    )


@contextmanager
def engine_of(config: StageConfig) -> Iterator[StageEngine]:
    engine = ENGINES[config.engine][0](config)
    try:
        yield engine
    finally:
        engine.close()


@dataclass(slots=True)
class Step:
    """What a step through all stages brought."""

    tokens: dict[int, int] = field(default_factory=dict)
    """Sampled, by sequence; -1 where no output was wanted."""
    logits: dict[int, Float32] = field(default_factory=dict)
    """float32 [vocabulary], by sequence."""
    failures: dict[int, EdgeError] = field(default_factory=dict)


class Stages:
    """Runners in a row: the rows that one gives are the rows that the next takes."""

    def __init__(self, runners: Sequence[StageRunner], vocabulary: int) -> None:
        self.runners = runners
        self.vocabulary = vocabulary
        self.positions: dict[int, int] = {}
        self.shift = 0
        """Added to all positions that later stages see: wrong on purpose, for controls."""
        self.permute = False
        """Later stages get every step's hidden rows backwards: wrong on purpose, for controls."""

    def open(
        self,
        sequence: int,
        prompt: Sequence[int] = (),
        sampler: SamplerSettings = GREEDY,
    ) -> None:
        for runner in self.runners:
            runner.open(sequence, sampler, prompt, logits=True)
        self.positions[sequence] = 0

    def close(self, sequence: int) -> None:
        for runner in self.runners:
            runner.close(sequence)
        self.positions.pop(sequence, None)

    def step(self, given: Mapping[int, Sequence[int]], *, output: bool = True) -> Step:
        """The next tokens of each sequence, all in one step."""
        rows = []
        for sequence, tokens in given.items():
            rows.append(Row(sequence, self.positions[sequence], len(tokens), output))
            self.positions[sequence] += len(tokens)
        ids = np.array([token for tokens in given.values() for token in tokens], np.int32)
        step = Step()
        self._run(0, tuple(rows), ids, None, step)
        return step

    def _run(
        self,
        index: int,
        rows: tuple[Row, ...],
        tokens: Int32 | None,
        hidden: Float32 | None,
        step: Step,
    ) -> None:
        if index and hidden is not None and self.permute:
            hidden = hidden[::-1]
        if index and self.shift:
            rows = tuple(row._replace(position=row.position + self.shift) for row in rows)
        for outcome in self.runners[index].step(rows, tokens, hidden):
            self._collect(outcome, step)
            if outcome.hidden is not None:
                self._run(index + 1, outcome.rows, None, outcome.hidden, step)

    @staticmethod
    def _collect(outcome: Outcome, step: Step) -> None:
        step.failures.update(outcome.failures)
        at = 0
        for result in outcome.results:
            step.tokens[result.sequence] = result.token
            if result.token >= 0 and outcome.logits is not None:
                step.logits[result.sequence] = outcome.logits[at]
                at += 1

    def generate(self, sequence: int, prompt: Sequence[int], count: int) -> list[int]:
        """Open, prefill in chunks of 16, decode greedily, close."""
        self.open(sequence, prompt)
        *before, last = [prompt[begin : begin + 16] for begin in range(0, len(prompt), 16)]
        for chunk in before:
            self.step({sequence: chunk}, output=False)
        tokens = [self.step({sequence: last}).tokens[sequence]]
        while len(tokens) < count:
            tokens.append(self.step({sequence: tokens[-1:]}).tokens[sequence])
        self.close(sequence)
        return tokens


@contextmanager
def open_stages(
    kind: str,
    spans: Sequence[tuple[int, int]],
    settings: EngineSettings,
    folder: Path,
) -> Iterator[Stages]:
    """Load the stages ``spans`` of a kind, in this order (a wrong one is the caller's control)."""
    runners = []
    try:
        for span in spans:
            config = stage_config(kind, span, settings, folder)
            make_engine, make_sampler = ENGINES[config.engine]
            runners.append(StageRunner(make_engine(config), config, make_sampler))
        yield Stages(runners, vocabulary_of(kind))
    finally:
        for runner in runners:
            runner.engine.close()


def prompt_of(kind: str, length: int, seed: int = 1) -> list[int]:
    """Random token ids; the first 3 of the tiny vocabulary are special."""
    random = np.random.default_rng(seed)
    return [int(token) for token in random.integers(3, vocabulary_of(kind), length)]
