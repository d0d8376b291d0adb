"""The process that knows the vocabulary of an ONNX model: by its ``tokenizer.json``.

Run as ``python -m edgellm.engine.tokenizer_child GRAPH VOCABULARY``: the model's .onnx file, and
how many logits it gives. The ``tokenizers`` library is native code, and reads a stranger's file:
what it does not like ends this process and nothing else. The client is ``text.py``, and what is
asked and answered is what ``text_child`` is asked and answers.
"""

from __future__ import annotations

import array
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgellm.engine.childmessages import Answer, answer_about_text
from edgellm.engine.childside import open_channel
from edgellm.errors import ModelFileError, StageError, UsageError
from edgellm.modelfile.onnx.config import TOKENIZER_FILE, ModelFolder, read_folder, read_small

MAX_TOKENIZER_BYTES = 128 << 20
CONFIG_FILE = "tokenizer_config.json"
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
END_TOKENS = frozenset(
    (
        "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>",
        "<|end_of_text|>", "<|return|>", "<|call|>", "</s>", "<EOT>", "<|end_of_turn|>",
    )
)  # fmt: skip
"""Special tokens that end an answer, whatever a model's configuration says."""


class JsonVocabulary:
    """A vocabulary in the format of the ``tokenizers`` library."""

    def __init__(self, graph: Path, logits: int) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415 - native code, in this process only

        folder = read_folder(graph)
        raw = read_small(folder.folder / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
        if raw is None:
            raise ModelFileError(
                f"{folder.folder} holds no {TOKENIZER_FILE}.",
                field=TOKENIZER_FILE,
                hint="Put the model's tokenizer.json beside its graph.",
            )
        try:
            self._tokenizer: Any = Tokenizer.from_buffer(raw)
            told = json.loads(raw)
        except Exception as error:
            reason = str(error)[:200]
            raise ModelFileError(
                f"{TOKENIZER_FILE} is no tokenizer: {reason}.", field=TOKENIZER_FILE
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = self._tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in known.items()}
        self._special = {number for number, token in known.items() if token.special}
        self.size = max(self._tokenizer.get_vocab_size(with_added_tokens=True), logits)
        self._bytes_of = _decoder_of(told)
        self._configure(folder)

    def _configure(self, folder: ModelFolder) -> None:
        raw = read_small(folder.folder / CONFIG_FILE, MAX_TOKENIZER_BYTES)
        try:
            config = json.loads(raw or b"{}")
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{CONFIG_FILE} is no JSON.", field=CONFIG_FILE) from error
        config = config if isinstance(config, dict) else {}
        self._bos = self._named(config.get("bos_token"), folder.bos)
        ends = [token for token in folder.eos if token < self.size]
        self._eos = self._named(config.get("eos_token"), ends[0] if ends else None)
        self._ends = {*ends, *([] if self._eos is None else [self._eos])}
        self._ends |= {n for n in self._special if self._added[n] in END_TOKENS}
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self._adds_bos = self._bos is not None and first == [self._bos]
        self._puts_bos = bool(config.get("add_bos_token")) and not self._adds_bos

    def _named(self, told: Any, otherwise: int | None) -> int | None:
        """The id of a special token that a configuration names: as text, or as an object."""
        name = told.get("content") if isinstance(told, dict) else told
        found = self._tokenizer.token_to_id(name) if isinstance(name, str) else None
        if isinstance(found, int):
            return found
        return otherwise if otherwise is not None and otherwise < self.size else None

    def info(self, _request: Mapping[str, Any]) -> Answer:
        return {
            "n_vocab": self.size,
            "bos": self._bos,
            "eos": self._eos,
            "eog": sorted(self._ends),
            "add_bos": self._bos is not None and (self._adds_bos or self._puts_bos),
            "bos_text": self._text_of(self._bos),
            "eos_text": self._text_of(self._eos),
        }

    def _text_of(self, token: int | None) -> bytes:
        if token is None:
            return b""
        name = self._added.get(token) or self._tokenizer.id_to_token(token)
        return name.encode() if isinstance(name, str) else b""

    def tokenize(self, request: Mapping[str, Any]) -> Answer:
        """Native 32-bit token ids of UTF-8 ``text``, as bytes."""
        special = bool(request["add_special"])
        # Control tokens that are written out in a text are text, unless the caller says otherwise.
        self._tokenizer.encode_special_tokens = not request["parse_special"]
        try:
            text = request["text"].decode()
            ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        except Exception as error:
            raise StageError(f"the text cannot be tokenized: {str(error)[:200]}.") from error
        if special and self._puts_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return {"ids": array.array("i", ids).tobytes()}

    def pieces(self, request: Mapping[str, Any]) -> Answer:
        """The bytes of each of the tokens ``ids`` (native 32-bit, as bytes)."""
        return {"pieces": [self._piece(token) for token in array.array("i", request["ids"])]}

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.size:
            raise UsageError(f"token {token} is outside the vocabulary of {self.size}.")
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token)
        return b"" if text is None else self._bytes_of(text)


def _decoder_of(told: Any) -> Callable[[str], bytes]:
    """How a token's text becomes bytes, as ``decoder`` of a tokenizer.json says.

    The library itself decodes whole texts only; a token may be part of a character.
    """
    decoder = told.get("decoder") if isinstance(told, dict) else None
    kinds = {part.get("type") for part in _parts(decoder)}
    if "ByteLevel" in kinds:
        return _from_byte_level
    if "WordPiece" in kinds:
        return _from_word_piece
    return _from_sentence_piece


def _parts(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    inner = decoder.get("decoders")
    parts = inner if isinstance(inner, list) else [decoder]
    return [part for part in parts if isinstance(part, dict)]


def _byte_level_table() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for
    themselves, the others for what follows Latin-1 in Unicode."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_level_table()


def _from_byte_level(text: str) -> bytes:
    if all(character in _BYTES for character in text):
        return bytes(_BYTES[character] for character in text)
    return text.encode()


def _from_sentence_piece(text: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()


def _from_word_piece(text: str) -> bytes:
    return text[2:].encode() if text.startswith("##") else f" {text}".encode()


def main() -> None:
    channel = open_channel()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one text at a time, and no threads for it
    answer_about_text(channel, lambda: JsonVocabulary(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
