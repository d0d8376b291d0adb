"""Chat templates, rendered at arm's length. Client of ``chat_child.py``.

A template is a program that came with a model file. It runs sandboxed, in a process that is
killed when it takes too long, and may use a bounded amount of memory and text.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgellm.engine.childcall import ChildCaller
from edgellm.errors import DeadlineError, ModelFileError, StageError, UsageError

RENDER_SECONDS = 1.0
START_SECONDS = 30.0
TEMPLATE_FIELD = "tokenizer.chat_template"
RAW_HINT = "Use --raw to send the prompt without the template."
MAX_TEMPLATE_CHARACTERS = 1 << 20


class ChatRenderer:
    """Renders chat templates in one helper process, started on first use and after each kill."""

    def __init__(self) -> None:
        self._caller: ChildCaller | None = None
        self._lock = asyncio.Lock()

    async def render(
        self, template: str, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """The prompt text.

        Raises UsageError where the template refuses the messages, ModelFileError where the
        template itself is at fault (broken, too slow, too large).
        """
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ModelFileError(
                f"the model's chat template has {len(template)} characters;"
                f" at most {MAX_TEMPLATE_CHARACTERS} are rendered.",
                field=TEMPLATE_FIELD,
                hint=RAW_HINT,
            )
        try:
            context = json.dumps({**variables, "messages": list(messages)}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the chat messages are no JSON: {error}.") from error
        async with self._lock:
            caller = await self._ready()
            try:
                answer = await caller.call(
                    "render",
                    RENDER_SECONDS,
                    template=template,
                    context=context,
                )
            except DeadlineError:
                raise ModelFileError(
                    f"the model's chat template ran longer than {RENDER_SECONDS:g} s.",
                    field=TEMPLATE_FIELD,
                    hint=RAW_HINT,
                ) from None
            except StageError as error:
                await self.stop()
                raise ModelFileError(
                    f"rendering the model's chat template failed: {error.message}",
                    field=TEMPLATE_FIELD,
                    hint=RAW_HINT,
                ) from error
            except ModelFileError:
                # It may have used up the memory it is allowed; the next one starts afresh.
                await self.stop()
                raise
        text = answer.get("text")
        if not isinstance(text, str):
            raise StageError("the chat template process gave no text.")
        return text

    async def _ready(self) -> ChildCaller:
        """A process that has its imports behind it, so that only the template is timed."""
        if self._caller is not None and self._caller.alive:
            return self._caller
        caller = await ChildCaller.start("edgellm.engine.chat_child", name="the template process")
        try:
            await caller.call("ready", START_SECONDS)
        except BaseException:
            await caller.stop()
            raise
        self._caller = caller
        return caller

    async def stop(self) -> None:
        caller, self._caller = self._caller, None
        if caller is not None:
            await caller.stop()


def require_messages(messages: Sequence[object]) -> None:
    """Raises UsageError unless every message is a dict with a ``role`` that is text."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError("every chat message must be an object with a 'role'.")
