"""A chat with a model that ``edgellm serve`` of the same home has loaded: nothing is loaded again.

Only where nothing was asked for that a server does not know: a split of one's own, figures of
stages, JSON. Then the chat loads the model itself, as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgellm.answer import GenerateOptions
from edgellm.api.announce import Elsewhere, RefusedError, server_of
from edgellm.cli.answers import Asides, harmless
from edgellm.cli.asked import Answering, HowLoaded, Loading, Reaching
from edgellm.cli.history import History
from edgellm.cli.interactive import HELP, turns
from edgellm.cli.lines import open_lines
from edgellm.cli.output import ctrl_c, say, tell
from edgellm.conversation import Conversation
from edgellm.errors import DeviceError, UsageError
from edgellm.modelref import OpenedModel

FULL = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Running:
    """A model that a server of this device has loaded."""

    server: Elsewhere
    name: str


async def running_here(
    home: Path, opened: OpenedModel, loading: Loading, answering: Answering, reaching: Reaching
) -> Running | None:
    """The running instance that this chat may use; None where it must load the model itself."""
    usual = HowLoaded()
    asked = any(
        getattr(loading, field.name) != getattr(usual, field.name) for field in fields(HowLoaded)
    )
    special = answering.as_json or answering.stats or not answering.reuse
    if asked or special or reaching.peer or not opened.digest:
        return None
    server = await asyncio.to_thread(server_of, home)
    if server is None:
        return None
    name = (await server.loaded()).get(opened.digest)
    return None if name is None else Running(server, name)


async def talk_elsewhere(
    running: Running, opened: OpenedModel, answering: Answering, home: Path
) -> None:
    """Answer the prompt or chat, over the running instance."""
    tell(f"{opened.name} is served at {running.server.url} already: using that.")
    templated = opened.chat_template is not None and not answering.raw
    chat = _Chat(running, templated, answering)
    if answering.prompt is not None:
        await chat.answer(answering.prompt)
        return
    lines = open_lines(lambda: History(home))
    try:
        if lines.typed:
            tell("Say something. /help lists what else you can do here.")
        task = asyncio.current_task()
        with ctrl_c(lambda: chat.interrupt(task)):
            await turns(chat, lines, Asides())
    finally:
        lines.close()


class _Chat:
    """The turns of one chat."""

    def __init__(self, running: Running, templated: bool, answering: Answering) -> None:
        self.reading = False
        self._running = running
        self._options = answering.options()
        self._conversation = Conversation(templated=templated, system=answering.system)
        self._answering: asyncio.Task[None] | None = None

    def interrupt(self, chat: asyncio.Task[object] | None) -> None:
        """Ctrl-C: stop the answer, or, where a line is waited for, the chat."""
        if self._answering is not None:
            if not self._answering.cancelling():  # a second one must not disturb the first's end
                self._answering.cancel()
        elif self.reading and chat is not None and not chat.cancelling():
            chat.cancel()

    async def take(self, text: str) -> bool:
        """Obey a command or answer a message; False to end the chat."""
        word = text.strip()
        if word == "/exit":
            return False
        if word == "/help":
            tell(HELP)
        elif word == "/clear":
            self._conversation.clear()
            tell("Forgotten.")
        elif word == "/stats":
            tell("Figures of a served model: curl the server's /v1/cluster.")
        elif text.startswith("/") and word[1:].isalpha():
            tell(f"There is no {word}; /help lists what there is.")
        else:
            await self._answered(text)
        return True

    async def _answered(self, text: str) -> None:
        task = self._answering = asyncio.create_task(self.answer(text))
        try:
            await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                await asyncio.wait({task})
                raise
            tell("\n[stopped]")
        except (UsageError, RefusedError) as error:  # of this message, not of the server
            tell(f"edgellm: {error}")
        finally:
            self._answering = None

    async def answer(self, text: str) -> None:
        """Show the answer as it comes, and remember it. Raises EdgeError."""
        said: list[str] = []
        began, first, count, finish = time.perf_counter(), 0.0, 0, "stop"
        terminal = sys.stdout.isatty()
        try:
            async with contextlib.aclosing(self._events(text)) as events:
                async for event in events:
                    count = (event.get("usage") or {}).get("completion_tokens", count)
                    for choice in event["choices"]:
                        delta = choice.get("delta", {})
                        piece = choice.get("text") or delta.get("content") or ""
                        said.append(piece)
                        # A thought is shown, but not remembered: templates leave it out too.
                        if shown := delta.get("reasoning_content") or piece:
                            first = first or time.perf_counter()
                            say(harmless(shown) if terminal else shown)
                        finish = choice["finish_reason"] or finish
        finally:
            if first:
                say("\n")
                self._conversation.add(text, "".join(said))
        took = time.perf_counter() - first
        speed = f", then {(count - 1) / took:.1f} tokens/s" if first and count > 1 else ""
        after = f"first token after {(first - began) * 1000:.0f} ms" if first else "no token"
        tell(f"[{count} tokens, {after}{speed}; {finish}]")

    async def _events(self, text: str) -> AsyncGenerator[dict[str, Any], None]:
        """Of the answer, after the oldest turns have been dropped where there is no room."""
        while True:
            prompt = self._conversation.prompt(text)
            body = {**_plain(self._options), "model": self._running.name}
            if isinstance(prompt, str):
                path, body["prompt"] = "/v1/completions", prompt
            else:
                path, body["messages"] = "/v1/chat/completions", prompt
            try:
                async with contextlib.aclosing(self._running.server.events(path, body)) as events:
                    async for event in events:
                        yield event
                return
            except RefusedError as error:
                if error.reason != FULL or not self._conversation.drop_oldest():
                    raise
            except OSError as error:
                raise DeviceError(f"the server at {self._running.server.url} is gone.") from error


def _plain(options: GenerateOptions) -> dict[str, Any]:
    """Options as a request has them."""
    sampler = options.sampler
    return {
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": options.max_tokens,
        "temperature": sampler.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "min_p": sampler.min_p,
        "repeat_penalty": sampler.repeat_penalty,
        "presence_penalty": sampler.presence_penalty,
        "frequency_penalty": sampler.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in sampler.logit_bias},
        "seed": sampler.seed,
        "stop": list(options.stop) or None,
        "ignore_eos": options.ignore_eos,
        "timeout": options.deadline_s,
    }
