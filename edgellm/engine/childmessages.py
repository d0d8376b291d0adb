"""Small msgpack messages behind a length: how a helper process is asked, and how it answers.

The format (pure) and the child's side of it (blocking). The node's side is ``childcall.py``.
A message is a map with text keys; ``call`` numbers it and ``what`` names the handler.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgpack

from edgellm.engine.childside import Channel
from edgellm.errors import EdgeError, StageError, UsageError

MAX_MESSAGE_BYTES = 32 << 20
LENGTH = struct.Struct("<I")

Answer = Mapping[str, Any]
Handler = Callable[[Mapping[str, Any]], Answer]


def pack_message(message: Mapping[str, Any]) -> bytes:
    """One message as bytes on the channel. Raises UsageError for what it cannot carry."""
    try:
        body = bytes(msgpack.packb(message, use_bin_type=True))
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        raise UsageError(f"the request cannot be encoded: {error}.") from error
    if len(body) > MAX_MESSAGE_BYTES:
        raise UsageError(f"the request has {len(body)} bytes; at most {MAX_MESSAGE_BYTES} fit.")
    return LENGTH.pack(len(body)) + body


def unpack_body(body: bytes) -> dict[str, Any]:
    """The message of a body. Raises StageError for anything but one map with text keys."""
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise StageError("a helper process sent bytes that are no message.") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise StageError("a helper process sent something that is no message.")
    return message


class MessageReader:
    """Collects bytes, gives whole messages. Raises StageError for an oversized or broken one."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        self._held += data
        messages = []
        while len(self._held) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._held)
            if length > MAX_MESSAGE_BYTES:
                raise StageError("a helper process sent a message that is too long.")
            end = LENGTH.size + length
            if len(self._held) < end:
                break
            messages.append(unpack_body(bytes(self._held[LENGTH.size : end])))
            del self._held[:end]
        return messages


def answer_calls(channel: Channel, handlers: Mapping[str, Handler]) -> None:
    """The child's loop: answer calls until the parent closes the channel.

    Deliberate errors travel back; any other ends the process, and its traceback is the reason.
    """
    while True:
        try:
            (length,) = LENGTH.unpack(channel.read_exactly(LENGTH.size))
            request = unpack_body(channel.read_exactly(length))
        except EOFError:
            return
        call = request["call"]
        try:
            packed = pack_message({**handlers[request["what"]](request), "call": call})
        except EdgeError as error:
            packed = pack_message({"error": error.to_dict(), "call": call})
        channel.write(packed)


class VocabularyCalls(Protocol):
    """What a process that knows a vocabulary is asked; see ``text.TextService``."""

    def info(self, request: Mapping[str, Any], /) -> Answer: ...
    def tokenize(self, request: Mapping[str, Any], /) -> Answer: ...
    def pieces(self, request: Mapping[str, Any], /) -> Answer: ...


def answer_about_text(channel: Channel, make: Callable[[], VocabularyCalls]) -> None:
    """The loop of such a process. ``make`` loads the vocabulary at the call ``load``: a call like
    the others, so that a refused load arrives as its typed error."""
    vocabulary: VocabularyCalls | None = None

    def load(request: Mapping[str, Any]) -> Answer:
        nonlocal vocabulary
        vocabulary = make()
        return vocabulary.info(request)

    def loaded() -> VocabularyCalls:
        if vocabulary is None:
            raise StageError("the vocabulary is not loaded.")
        return vocabulary

    answer_calls(
        channel,
        {
            "load": load,
            "tokenize": lambda request: loaded().tokenize(request),
            "pieces": lambda request: loaded().pieces(request),
        },
    )
