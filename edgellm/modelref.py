"""What ``--model`` may name, opened: its card, its engine, and how its text is made.

A path to a GGUF, or to an ONNX model (its folder or its .onnx file). ``stub:LAYERS`` is the
deterministic engine without a model, for tests and fault benches (``stub:8:delay=0.01`` makes every
decode call take 10 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgellm.engine.text import TextService, VocabularyInfo
from edgellm.errors import ModelFileError, UsageError
from edgellm.modelfile import ModelCard as GgufCard
from edgellm.modelfile import read_card
from edgellm.modelfile.model import Model
from edgellm.modelfile.onnx import OnnxCard, is_onnx, open_onnx
from edgellm.planner import ModelCard, StageMemory, StageWork
from edgellm.types import EngineSettings, LayerSpan

DEMO_FILE = "edgellm-demo.gguf"
STUB_PREFIX = "stub:"
STUB_WIDTH = 8
STUB_VOCABULARY = 256


class Text(Protocol):
    """Text to tokens and back for one model."""

    async def info(self) -> VocabularyInfo: ...

    async def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...

    async def pieces(self, ids: Sequence[int]) -> list[bytes]: ...

    async def preload(self) -> None: ...

    async def render_chat(
        self, template: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A validated model, before any plan."""

    name: str
    engine: str
    path: str
    digest: str
    card: ModelCard
    width: int
    vocab: int
    context_train: int
    chat_template: str | None
    model: Model | None = None
    """The file's header, where there is a file."""

    async def text(self) -> Text:
        """Start what turns text into tokens; the caller stops it."""
        if self.engine == "stub":
            return ByteText()
        if self.engine == "onnx":
            return await TextService.start_json(self.path, self.vocab)
        return await TextService.start(self.path)


def demo_model() -> str:
    """The path of the bundled model. Raises UsageError where it was not installed."""
    package = Path(__file__).resolve().parent
    for folder in (package / "models", package.parent / "models"):
        if (folder / DEMO_FILE).is_file():
            return str(folder / DEMO_FILE)
    raise UsageError("no model was named.", hint="Name a GGUF file with --model.")


def open_reference(model: str) -> OpenedModel:
    """Open and validate ``model``. Raises UsageError or ModelFileError; blocking, but quick."""
    if model.startswith(STUB_PREFIX):
        return _stub(model)
    if is_onnx(Path(model)):
        return _onnx(model)
    card: GgufCard = read_card(model)
    return OpenedModel(
        name=card.name,
        engine="llama",
        path=str(card.model.paths[0].resolve()),
        digest=card.digest,
        card=card,
        width=card.n_embd,
        vocab=card.n_vocab,
        context_train=card.context_train,
        chat_template=card.chat_template,
        model=card.model,
    )


def _onnx(model: str) -> OpenedModel:
    opened = open_onnx(model)
    card = OnnxCard(opened)
    return OpenedModel(
        name=card.name,
        engine="onnx",
        path=str(opened.paths[0].resolve()),
        digest=card.digest,
        card=card,
        width=card.n_embd,
        vocab=card.n_vocab,
        context_train=card.context_train,
        chat_template=card.chat_template,
        model=opened,
    )


# --- the stub -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _StubMemory:
    total: int


@dataclass(frozen=True, slots=True)
class _StubWork:
    decode_bytes: int
    prefill_flops: int
    head_bytes: int = 0
    scan_bytes: int = 0
    scan_flops: int = 0


@dataclass(frozen=True, slots=True)
class StubCard:
    """A model of ``n_layers`` that weighs a mebibyte a layer and may be cut anywhere."""

    n_layers: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(range(1, self.n_layers))

    @property
    def n_embd(self) -> int:
        return STUB_WIDTH

    def span_problem(self, span: LayerSpan) -> str | None:
        return None

    def stage_work(self, span: LayerSpan, settings: EngineSettings, cached: int) -> StageWork:
        return _StubWork(decode_bytes=len(span) << 20, prefill_flops=len(span) << 21)

    def stage_memory(self, span: LayerSpan, settings: EngineSettings) -> StageMemory:
        return _StubMemory(len(span) << 20)


class ByteText:
    """A token is a byte; nothing ends an answer."""

    async def info(self) -> VocabularyInfo:
        return VocabularyInfo(STUB_VOCABULARY, None, None, frozenset(), False)

    async def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        return [bytes([token]) for token in ids]

    async def preload(self) -> None:
        pass

    async def render_chat(
        self, template: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        raise ModelFileError("the stub has no chat template.")

    async def stop(self) -> None:
        pass


def _stub(model: str) -> OpenedModel:
    layers, _, delay = model.removeprefix(STUB_PREFIX).partition(":")
    if not layers.isdecimal() or not 1 <= int(layers) <= 1024:
        raise UsageError(f"{model!r} is not stub:LAYERS with 1 to 1024 layers.")
    return OpenedModel(
        name="stub",
        engine="stub",
        path=delay,
        digest="",
        card=StubCard(int(layers)),
        width=STUB_WIDTH,
        vocab=STUB_VOCABULARY,
        context_train=1 << 20,
        chat_template=None,
    )
