"""Text to tokens and back, and chat to text: the async client of two helper processes.

No native code runs here. The vocabulary lives in ``text_child.py``, templates are rendered by
``chat_child.py``; either may crash without harm to the caller beyond a typed error.
"""

from __future__ import annotations

import array
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edgellm.engine.chat import ChatRenderer, require_messages
from edgellm.engine.childcall import ChildCaller
from edgellm.errors import StageError, UsageError

LOAD_SECONDS = 60.0
CALL_SECONDS = 30.0
MAX_TEXT_BYTES = 8 << 20
_IDS_PER_CALL = 4096


@dataclass(frozen=True, slots=True)
class VocabularyInfo:
    """What one must know of a vocabulary to generate with it. Ids are token ids."""

    n_vocab: int
    bos: int | None
    eos: int | None
    eog: frozenset[int]
    """All tokens that end a generation."""
    add_bos: bool
    """Whether ``tokenize(add_special=True)`` puts ``bos`` first."""
    bos_text: str = ""
    eos_text: str = ""


class TextService:
    """One model's vocabulary and chat templates. Make it with ``start``; end it with ``stop``."""

    def __init__(self, caller: ChildCaller, info: VocabularyInfo) -> None:
        self._caller = caller
        self._info = info
        self._renderer = ChatRenderer()
        self._pieces: dict[int, bytes] = {}

    @classmethod
    async def start(cls, model_path: str | Path) -> TextService:
        """Load the vocabulary of a GGUF file that was validated before.

        Raises ModelFileError where llama.cpp refuses it, StageError where it crashes.
        """
        return await cls._start("edgellm.engine.text_child", str(model_path))

    @classmethod
    async def start_json(cls, graph: str | Path, vocabulary: int) -> TextService:
        """Load the ``tokenizer.json`` of an ONNX model, named by its .onnx file, that gives
        ``vocabulary`` logits. Raises ModelFileError, StageError."""
        return await cls._start("edgellm.engine.tokenizer_child", str(graph), str(vocabulary))

    @classmethod
    async def _start(cls, module: str, *arguments: str) -> TextService:
        caller = await ChildCaller.start(module, name="the tokenizer", arguments=arguments)
        try:
            return cls(caller, _vocabulary_info(await caller.call("load", LOAD_SECONDS)))
        except BaseException:
            await caller.stop()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the helper processes. May be called more than once."""
        await asyncio.gather(self._caller.stop(), self._renderer.stop())

    @property
    def pid(self) -> int:
        """Process id of the tokenizer."""
        return self._caller.pid

    async def info(self) -> VocabularyInfo:
        return self._info

    async def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``.

        ``add_special`` adds what the model wants around a text (such as BOS); ``parse_special``
        reads control tokens written out in it: never set that for text from a user.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the text holds characters that are not Unicode text.") from error
        if len(data) > MAX_TEXT_BYTES:
            raise UsageError(f"the text has {len(data)} bytes; at most {MAX_TEXT_BYTES} fit.")
        answer = await self._caller.call(
            "tokenize",
            CALL_SECONDS,
            text=data,
            add_special=add_special,
            parse_special=parse_special,
        )
        ids = answer.get("ids")
        if not isinstance(ids, bytes) or len(ids) % 4:
            raise StageError("the tokenizer answered with something that is no tokens.")
        return array.array("i", ids).tolist()

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes each token stands for; control tokens give ``b""``. Cached.

        A piece need not be whole characters: see ``textstream.IncrementalDecoder``.
        Raises UsageError for an id outside the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self._info.n_vocab:
                raise UsageError(
                    f"token {token} is outside the vocabulary of {self._info.n_vocab}."
                )
        missing = [token for token in dict.fromkeys(ids) if token not in self._pieces]
        for first in range(0, len(missing), _IDS_PER_CALL):
            wanted = missing[first : first + _IDS_PER_CALL]
            answer = await self._caller.call(
                "pieces", CALL_SECONDS, ids=array.array("i", wanted).tobytes()
            )
            pieces = answer.get("pieces")
            if not isinstance(pieces, list) or len(pieces) != len(wanted):
                raise StageError("the tokenizer answered with something that is no pieces.")
            self._pieces.update(zip(wanted, pieces, strict=True))
        return [self._pieces[token] for token in ids]

    async def preload(self) -> None:
        """Fetch all pieces now (some 50 ms for 32,000 tokens), so that no token of an answer has
        to wait for, or share a processor with, the tokenizer's process."""
        await self.pieces(range(self._info.n_vocab))

    async def render_chat(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's own chat template makes of the messages.

        ``template`` comes from the model file, never from a request. ``variables`` (such as
        ``tools``) are given to the template as they are. Raises UsageError where the template
        refuses the messages, ModelFileError where the template is at fault.
        """
        require_messages(messages)
        given = {
            "bos_token": self._info.bos_text,
            "eos_token": self._info.eos_text,
            **(variables or {}),
            "add_generation_prompt": add_generation_prompt,
        }
        if "messages" in given:
            raise UsageError("'messages' cannot be given as a template variable as well.")
        return await self._renderer.render(template, messages, given)


def _vocabulary_info(answer: Mapping[str, Any]) -> VocabularyInfo:
    try:
        return VocabularyInfo(
            n_vocab=int(answer["n_vocab"]),
            bos=answer["bos"],
            eos=answer["eos"],
            eog=frozenset(answer["eog"]),
            add_bos=bool(answer["add_bos"]),
            bos_text=answer["bos_text"].decode("utf-8", "replace"),
            eos_text=answer["eos_text"].decode("utf-8", "replace"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StageError("the tokenizer answered with something that is no vocabulary.") from error
