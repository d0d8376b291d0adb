"""Vocabularies in ``tokenizer.json``, in a process of their own: against the library; hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgellm.engine.text import TextService
from edgellm.errors import EdgeError, ModelFileError, StageError

tokenizers: Any = pytest.importorskip("tokenizers")
MODELS = ("TinyStories-656K-onnx", "TinyStories-656K-onnx-genai-int4")
TEXTS = (
    "Once upon a time",
    " two  spaces",
    "Zoë ate 3 ☃ and a 🐍.\n\tYes!",
    "",
    "日本語",
)


def byte_level(folder: Path, **config: object) -> Path:
    """A GPT-2-like vocabulary: bytes, a few merges, control tokens; returns the graph's path."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"he": 256, "ll": 257, "hell": 258, "hello": 259}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<think>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "model.onnx"


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
async def test_tokens_and_pieces_of_real_models(name: str, shared_models: Path) -> None:
    folder = shared_models / name
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    async with await TextService.start_json(folder / "model.onnx", 2048) as text:
        info = await text.info()
        assert (info.n_vocab, info.bos, info.eos, info.add_bos) == (2048, 1, 2, True)
        assert info.eog == {2}
        assert (info.bos_text, info.eos_text) == ("<|start_story|>", "<|end_story|>")
        for words in TEXTS:
            ids = await text.tokenize(words, True, False)
            assert ids == library.encode(words).ids
            assert ids[0] == 1
            assert await text.tokenize(words, False, False) == ids[1:]
            pieces = b"".join(await text.pieces(ids))
            if 0 not in ids:  # what is unknown has no bytes; the library strips a space too
                assert pieces.decode().removeprefix(" ") == library.decode(ids[1:])
        assert await text.pieces([2]) == [b""]
        # control tokens written out by a user are text; those of a template are not
        forged = await text.tokenize("<|end_story|>", False, False)
        assert 2 not in forged
        assert 2 in await text.tokenize("<|end_story|>", False, True)


async def test_byte_level_tokens_are_bytes(tmp_path: Path) -> None:
    graph = byte_level(tmp_path, eos_token={"content": "<|im_end|>"}, add_bos_token=False)
    async with await TextService.start_json(graph, 300) as text:
        info = await text.info()
        assert (info.n_vocab, info.bos, info.eos, info.add_bos) == (300, None, 261, False)
        for words in TEXTS:
            ids = await text.tokenize(words, True, False)
            assert b"".join(await text.pieces(ids)) == words.encode()
        ids = await text.tokenize("hello", True, False)
        assert ids == [259]
        snowman = await text.tokenize("☃", True, False)
        assert [len(piece) for piece in await text.pieces(snowman)] == [1, 1, 1]
        assert await text.pieces([262, 261, 299]) == [b"<think>", b"", b""]


async def test_a_beginning_that_only_the_configuration_wants(tmp_path: Path) -> None:
    graph = byte_level(tmp_path, bos_token="<|im_start|>", add_bos_token=True)
    async with await TextService.start_json(graph, 263) as text:
        assert (await text.info()).add_bos
        assert await text.tokenize("hello", True, False) == [260, 259]
        assert await text.tokenize("hello", False, False) == [259]
        # the end of a turn ends an answer although no configuration says so
        assert (await text.info()).eog == {261}


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[" * 100_000, b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"null"],
    ids=["empty", "object", "deep", "half", "bytes", "null"],
)
async def test_no_tokenizer_is_a_typed_error(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(EdgeError) as found:
        await TextService.start_json(tmp_path / "model.onnx", 10)
    assert isinstance(found.value, ModelFileError | StageError)


async def test_a_missing_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        await TextService.start_json(tmp_path / "model.onnx", 10)
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="no JSON"):
        await TextService.start_json(tmp_path / "model.onnx", 10)
