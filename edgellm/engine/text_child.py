"""The process that knows a model's vocabulary: text to tokens and back, by llama.cpp.

Run as ``python -m edgellm.engine.text_child MODEL``. It loads the vocabulary only, no
weights. The parent has validated the file; what llama.cpp still does not like ends this
process and nothing else. The client is ``text.py``.
"""

from __future__ import annotations

import array
import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Any

from edgellm.engine.bindings import llama
from edgellm.engine.childmessages import Answer, answer_about_text
from edgellm.engine.childside import open_channel, set_fields, take_llama_error
from edgellm.errors import ModelFileError, StageError, UsageError

_PIECE_BYTES = 256
_NO_TOKEN = -1


class Vocabulary:
    """llama.cpp's vocabulary of one GGUF file."""

    def __init__(self, path: str) -> None:
        self._llama: Any = llama()
        self._llama.llama_backend_init()
        parameters = self._llama.llama_model_default_params()
        set_fields(parameters, vocab_only=True, n_gpu_layers=0)
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            detail = take_llama_error() or "it gives no reason"
            raise ModelFileError(
                f"llama.cpp refuses the vocabulary: {detail}.", field="tokenizer.ggml"
            )
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        if self._llama.llama_vocab_type(self._vocab) == self._llama.LLAMA_VOCAB_TYPE_NONE:
            raise ModelFileError(
                "the model file has no tokenizer.",
                field="tokenizer.ggml.model",
                hint="A shard of a later stage has none; use the whole model's file.",
            )
        self.size = int(self._llama.llama_vocab_n_tokens(self._vocab))
        self._buffer = ctypes.create_string_buffer(_PIECE_BYTES)

    def info(self, _request: Mapping[str, Any]) -> Answer:
        native, vocab = self._llama, self._vocab
        bos, eos = native.llama_vocab_bos(vocab), native.llama_vocab_eos(vocab)
        return {
            "n_vocab": self.size,
            "bos": None if bos == _NO_TOKEN else bos,
            "eos": None if eos == _NO_TOKEN else eos,
            "eog": [i for i in range(self.size) if native.llama_vocab_is_eog(vocab, i)],
            "add_bos": bool(native.llama_vocab_get_add_bos(vocab)),
            "bos_text": self._piece(bos, special=True) if bos != _NO_TOKEN else b"",
            "eos_text": self._piece(eos, special=True) if eos != _NO_TOKEN else b"",
        }

    def tokenize(self, request: Mapping[str, Any]) -> Answer:
        """Native 32-bit token ids of UTF-8 ``text``, as bytes."""
        text: bytes = request["text"]
        room = len(text) + 8  # a byte is at most one token, and a few special ones are added
        for _ in range(2):
            tokens = (ctypes.c_int32 * room)()
            count = self._llama.llama_tokenize(
                self._vocab,
                text,
                len(text),
                tokens,
                room,
                bool(request["add_special"]),
                bool(request["parse_special"]),
            )
            if 0 <= count <= room:
                return {"ids": bytes(memoryview(tokens).cast("B")[: count * 4])}
            room = -count
        raise StageError(f"llama.cpp could not tokenize {len(text)} bytes of text.")

    def pieces(self, request: Mapping[str, Any]) -> Answer:
        """The bytes of each of the tokens ``ids`` (native 32-bit, as bytes)."""
        ids = array.array("i", request["ids"])
        for token in ids:
            if not 0 <= token < self.size:
                raise UsageError(f"token {token} is outside the vocabulary of {self.size}.")
        return {"pieces": [self._piece(token, special=False) for token in ids]}

    def _piece(self, token: int, *, special: bool) -> bytes:
        for _ in range(2):
            count = self._llama.llama_token_to_piece(
                self._vocab, token, self._buffer, len(self._buffer), 0, special
            )
            if count >= 0:
                return self._buffer.raw[:count]
            self._buffer = ctypes.create_string_buffer(-count)
        raise StageError(f"llama.cpp gives no text for token {token}.")


def main() -> None:
    answer_about_text(open_channel(), lambda: Vocabulary(sys.argv[1]))


if __name__ == "__main__":
    main()
