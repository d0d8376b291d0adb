"""A cut ONNX model is the whole one, bit for bit, with its negative controls.

The whole model runs in onnxruntime without any of our code: ``tests.onnxreference``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgellm.engine.base import Float32, SlotRow, StageConfig
from edgellm.modelfile.cut import write_shard
from edgellm.modelfile.onnx import OnnxModel, onnx_recipe, open_onnx
from edgellm.types import LayerSpan, Mode
from tests.onnxreference import WholeOnnx
from tests.stages import settings_of
from tests.tinyonnx import HEAD, KINDS, LAYERS, write_tangled_onnx, write_tiny_onnx

MODELS = ("TinyStories-656K-onnx", "TinyStories-656K-onnx-genai-int4")
PROMPTS = (
    "Once upon a time",
    "The little dog was sad because",
    "Lily and Tom went to the park. They saw",
    '"Can I help you?" asked the bird.',
    "One day, a boy named Ben found a key",
    "It was raining and the cat",
    "There was a big tree in the garden",
    "Mom said that dinner was ready, but",
    "The old car did not want to",
    "In the morning, the sun",
)


class Row:
    """Engines in a row, without processes and wires; one sequence."""

    def __init__(self, model: OnnxModel, spans: Sequence[tuple[int, int]], folder: Path) -> None:
        engine: type = pytest.importorskip("edgellm.engine.onnx").OnnxEngine
        settings = settings_of(context=256, chunk=64, sequences=1)
        self.engines = []
        self.length = 0
        self.permute = False
        self.shift = 0
        for first, end in spans:
            span = LayerSpan(first, end)
            path = model.paths[0]
            if len(span) < model.layers:
                path = folder / f"{model.digest[:12]}-{first}-{end}.gguf"
                write_shard(onnx_recipe(model, span), model.read, path)
            config = StageConfig(
                "onnx", span, model.layers, model.width, model.vocab, settings, shard=str(path)
            )
            self.engines.append(engine(config))

    def decode(self, tokens: Sequence[int]) -> Float32:
        """Logits [vocabulary] after the last of the tokens."""
        hidden: Float32 | None = None
        for index, engine in enumerate(self.engines):
            position = self.length + (self.shift if index else 0)
            rows = [SlotRow(0, position, len(tokens), True)]
            given = np.array(tokens, np.int32) if index == 0 else None
            made = engine.decode(rows, given, hidden)
            hidden = made.hidden
            if hidden is not None and self.permute:
                hidden = np.ascontiguousarray(hidden[:, ::-1])
        self.length += len(tokens)
        assert made.logits is not None
        logits: Float32 = made.logits[0]
        return logits

    def reset(self) -> None:
        self.length = 0
        for engine in self.engines:
            engine.clear(0)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


@contextmanager
def stages(model: OnnxModel, spans: Sequence[tuple[int, int]], folder: Path) -> Iterator[Row]:
    row = Row(model, spans, folder)
    try:
        yield row
    finally:
        row.close()


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )
    return [tokenizer.encode(text).ids for text in PROMPTS]


def greedy(decode: object, prompt: Sequence[int], count: int) -> tuple[list[int], list[Float32]]:
    """The tokens and the logits that each was picked from."""
    tokens: list[int] = []
    seen: list[Float32] = []
    given: Sequence[int] = prompt
    while len(tokens) < count:
        logits = decode(given)  # type: ignore[operator]
        seen.append(np.array(logits, np.float32))
        tokens.append(int(logits.argmax()))
        given = tokens[-1:]
    return tokens, seen


def same(one: Sequence[Float32], other: Sequence[Float32]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.models
@pytest.mark.parametrize("spans", [((0, 2),), ((0, 1), (1, 2))], ids=["whole", "two stages"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_models_say_the_same_200_tokens(
    name: str, spans: Sequence[tuple[int, int]], shared_models: Path, tmp_path: Path
) -> None:
    folder = shared_models / name
    whole = WholeOnnx(folder / "model.onnx")
    with stages(open_onnx(folder), spans, tmp_path) as row:
        for prompt in prompts(folder):
            whole.reset()
            row.reset()
            wanted, logits = greedy(lambda given: whole.decode(given)[-1], prompt, 200)
            tokens, mine = greedy(row.decode, prompt, 200)
            assert tokens == wanted
            assert same(mine, logits)
        if len(spans) > 1:
            for control in ("permute", "shift"):
                row.reset()
                setattr(row, control, 1)
                _, wrong = greedy(row.decode, prompt, 4)
                setattr(row, control, 0)
                assert not same(wrong, logits[:4])
    # negative control: the reference itself sees a wrong position
    if name == MODELS[0]:
        whole.reset()
        whole.decode(prompt[:-1])
        right = whole.decode(prompt[-1:])
        whole.reset()
        whole.decode(prompt[:-1])
        assert not np.array_equal(whole.decode(prompt[-1:], shift=1), right)


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_would_be_computed_again(
    name: str, shared_models: Path, tmp_path: Path
) -> None:
    """Each of 40 steps against all tokens from the beginning in one call.

    Tokens must be the same. Bits need not: a product of many rows is summed in another order than
    that of one (float32: at most 1e-4 at logits of some 10; with activations quantised to 8 bits
    for int4 weights a rounding may tip: 0.5).
    """
    folder = shared_models / name
    prompt = prompts(folder)[0]
    with stages(open_onnx(folder), ((0, 1), (1, 2)), tmp_path) as row:
        tokens, kept = greedy(row.decode, prompt, 40)
        largest = 0.0
        for step in range(0, 40, 3):
            row.reset()
            again = row.decode([*prompt, *tokens[:step]])
            assert int(again.argmax()) == tokens[step]
            largest = max(largest, float(np.abs(again - kept[step]).max()))
        print(f"{name}: largest difference {largest:.2e}")
        assert largest <= (1e-4 if name == MODELS[0] else 0.5)
        # negative control: without what was kept, the last token alone says something else
        row.reset()
        alone = row.decode(tokens[38:39])
        assert np.abs(alone - kept[39]).max() > 1.0


def tiny(kind: str, folder: Path) -> OnnxModel:
    return open_onnx(write_tiny_onnx(kind, folder / kind))


def random_calls(seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[int(t) for t in random.integers(3, 288, n)] for n in (9, 8, *[1] * 8)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_boundary_of_every_kind(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, tmp_path)
    assert set(model.cuts) == set(range(1, LAYERS)), model.uncut
    whole = WholeOnnx(model.paths[0], head=HEAD)
    calls = random_calls(1)
    wanted = [whole.decode(call)[-1] for call in calls]
    splits: list[tuple[tuple[int, int], ...]] = [((0, LAYERS),)]
    splits += [((0, cut), (cut, LAYERS)) for cut in range(1, LAYERS)]
    splits.append(tuple((layer, layer + 1) for layer in range(LAYERS)))
    for spans in splits:
        with stages(model, spans, tmp_path) as row:
            assert same([row.decode(call) for call in calls], wanted), spans
            if len(spans) > 1:
                row.reset()
                row.permute = True
                assert not same([row.decode(call) for call in calls], wanted)
    with stages(model, ((0, 2), (3, LAYERS)), tmp_path) as row:  # negative: a layer left out
        assert not same([row.decode(call) for call in calls], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_names_do_not_matter(kind: str, tmp_path: Path) -> None:
    """All names inside the graph replaced, and what the file says of its tensors removed."""
    onnx = pytest.importorskip("onnx")
    named = tiny(kind, tmp_path)
    graph = onnx.load(str(named.paths[0]))
    puts = {put.name for put in (*graph.graph.input, *graph.graph.output)}
    hidden: dict[str, str] = {"": ""}

    def other(name: str) -> str:
        if name in puts:
            return name
        return hidden.setdefault(name, f"x{len(hidden)}")

    for node in graph.graph.node:
        node.name = ""
        node.input[:] = [other(name) for name in node.input]
        node.output[:] = [other(name) for name in node.output]
    for tensor in graph.graph.initializer:
        tensor.name = other(tensor.name)
    del graph.graph.value_info[:]
    (tmp_path / "hidden").mkdir()
    onnx.save(graph, str(tmp_path / "hidden" / "model.onnx"))
    model = open_onnx(tmp_path / "hidden")
    assert {b: [c.width for c in cut.crossing] for b, cut in model.cuts.items()} == {
        b: [c.width for c in cut.crossing] for b, cut in named.cuts.items()
    }
    calls = random_calls(2)
    whole = WholeOnnx(named.paths[0], head=HEAD)
    with stages(model, ((0, 2), (2, LAYERS)), tmp_path) as row:
        assert same([row.decode(c) for c in calls], [whole.decode(c)[-1] for c in calls])


def test_what_crosses(tmp_path: Path) -> None:
    """One residual tensor; two in float16, where adding before sending would round."""
    for kind in KINDS:
        (cut,) = {
            tuple((c.width, c.type) for c in cut.crossing)
            for cut in tiny(kind, tmp_path).cuts.values()
        }
        assert cut == (((64, 10), (64, 10)) if kind == "onnx-half" else ((64, 1),))


@pytest.mark.parametrize("kind", KINDS)
def test_normal_mode_asks_the_head_for_one_row(kind: str, tmp_path: Path) -> None:
    """The head's product of one row may round otherwise than that of many: 1e-5 of the logits in
    float32, and a few units of float16's last place (2**-11)."""
    model = tiny(kind, tmp_path)
    engine: type = pytest.importorskip("edgellm.engine.onnx").OnnxEngine
    prompt = np.array(random_calls(3)[0], np.int32)
    made: dict[Mode, NDArray[np.float32]] = {}
    for mode in Mode:
        config = StageConfig(
            "onnx",
            LayerSpan(0, LAYERS),
            LAYERS,
            model.width,
            model.vocab,
            settings_of(mode),
            shard=str(model.paths[0]),
        )
        running = engine(config)
        made[mode] = running.decode([SlotRow(0, 0, len(prompt), True)], prompt, None).logits
        assert running._heads(len(prompt)) == (1 if mode is Mode.NORMAL else len(prompt))
        running.close()
    limit = 4e-3 if kind == "onnx-half" else 1e-5
    largest = np.abs(made[Mode.REFERENCE]).max()
    assert np.abs(made[Mode.NORMAL] - made[Mode.REFERENCE]).max() <= limit * largest


def test_dynamic_int8(tmp_path: Path) -> None:
    """Weights of 8 bits, activations quantised anew for each call, as optimum exports them."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = write_tiny_onnx("onnx-plain", tmp_path / "float")
    (tmp_path / "int8").mkdir()
    quantised = tmp_path / "int8" / "model.onnx"
    told = {"DefaultTensorType": 1}  # the norms are onnxruntime's own operator: float32
    quantization.quantize_dynamic(path, quantised, extra_options=told)
    model = open_onnx(quantised)
    operators = {node.op for node in model.decoder.graph.nodes}
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= operators
    assert set(model.cuts) == set(range(1, LAYERS)), model.uncut
    whole = WholeOnnx(quantised, head=HEAD)
    calls = random_calls(4)
    wanted = [whole.decode(call)[-1] for call in calls]
    for cut in model.cuts:
        with stages(model, ((0, cut), (cut, LAYERS)), tmp_path) as row:
            assert same([row.decode(call) for call in calls], wanted)
    with stages(model, ((0, 2), (3, LAYERS)), tmp_path) as row:  # negative: a layer left out
        assert not same([row.decode(call) for call in calls], wanted)


def test_what_cannot_be_cut_runs_whole(tmp_path: Path) -> None:
    model = open_onnx(write_tangled_onnx(tmp_path / "tangled"))
    assert not model.cuts
    whole = WholeOnnx(model.paths[0], head=HEAD)
    plain = WholeOnnx(write_tiny_onnx("onnx-plain", tmp_path / "plain", layers=8), head=HEAD)
    calls = random_calls(5)
    wanted = [whole.decode(call)[-1] for call in calls]
    with stages(model, ((0, model.layers),), tmp_path) as row:
        assert same([row.decode(call) for call in calls], wanted)
    # negative control: what was tangled does matter
    assert not same([plain.decode(call)[-1] for call in calls], wanted)
