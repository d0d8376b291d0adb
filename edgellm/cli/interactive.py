"""A chat line by line: typed at a terminal, or piped in, a line a turn.

Answers go to standard output, everything else to standard error. Ctrl-C ends the answer that is
being made and keeps what came; at an empty prompt it ends the chat.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from edgellm.answer import Completion, GenerateOptions
from edgellm.cli.answers import Asides, stream, summary, who_did_what
from edgellm.cli.history import History
from edgellm.cli.lines import DroppedError, Lines, open_lines
from edgellm.cli.output import ctrl_c, say, tell, tell_with
from edgellm.cli.typed import Message
from edgellm.errors import DeadlineError, UsageError
from edgellm.loaded import Chat, LoadedModel

PROMPT, MORE = ">>> ", "... "

HELP = """\
/help    this
/clear   forget what was said so far
/stats   who did what for the last answer
/exit    leave, as Ctrl-D
End a line with \\ to go on in the next one, or put several between two lines of \"\"\".
Ctrl-C stops an answer."""


async def converse(
    model: LoadedModel,
    options: GenerateOptions,
    *,
    home: Path | None,
    system: str | None = None,
    stats: bool = False,
    asides: Asides | None = None,
) -> None:
    """Chat until the input ends or the person leaves. ``asides`` has what is told meanwhile.

    Raises UsageError where the input has no line at all, CancelledError for Ctrl-C at the prompt.
    """
    chat = TypedChat(model.chat(options, system=system), stats=stats, verdict=lambda: model.verdict)
    lines = open_lines(lambda: History(home))
    try:
        if lines.typed:
            tell("Say something. /help lists what else you can do here.")
        task = asyncio.current_task()
        with ctrl_c(lambda: chat.interrupt(task)):
            await turns(chat, lines, asides or Asides())
    finally:
        lines.close()


class Taking(Protocol):
    """What answers messages: ``TypedChat``."""

    reading: bool
    """Whether the next line is being waited for."""

    async def take(self, text: str) -> bool:
        """Obey a command or answer a message; False to end the chat."""


async def turns(chat: Taking, lines: Lines, asides: Asides) -> None:
    """Messages until there are no more, each answered or obeyed."""
    message = Message()
    heard = False
    while True:
        try:
            chat.reading = True
            with asides.typing() if lines.typed else contextlib.nullcontext():
                line = await lines.read(MORE if message.begun else PROMPT)
        except DroppedError as dropped:
            if dropped.empty and not message.begun:
                # As Ctrl-C anywhere else: the command ends as one that was interrupted.
                raise asyncio.CancelledError from None
            message.drop()
            continue
        except EOFError:
            text = message.rest()
            if lines.typed:
                say("\n")
            if text.strip():
                await chat.take(text)
            elif not heard and not lines.typed:
                raise UsageError(
                    "there is no prompt.", hint="Give one with --prompt, or lines to answer."
                ) from None
            return
        finally:
            chat.reading = False
        text = message.feed(line) or ""
        if not text.strip():
            continue
        heard = True
        lines.remember(text)
        if not await chat.take(text):
            return


class TypedChat:
    """The turns of one chat."""

    def __init__(
        self,
        chat: Chat,
        *,
        stats: bool,
        verdict: Callable[[], str] = str,
    ) -> None:
        """``verdict`` says why layers stay where they are, if anything does."""
        self.reading = False
        """Whether the next line is being waited for."""
        self._chat = chat
        self._stats = stats
        self._verdict = verdict
        self._last: Completion | None = None
        self._answering: asyncio.Task[None] | None = None
        self._told_of_dropping = False
        self._commands: Mapping[str, Callable[[], bool]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/stats": self._show_stats,
            "/exit": lambda: False,
        }

    def interrupt(self, chat: asyncio.Task[object] | None) -> None:
        """Ctrl-C as a signal: stop the answer, or, where a line is waited for, the chat."""
        if self._answering is not None:
            if not self._answering.cancelling():  # a second one must not disturb the first's end
                self._answering.cancel()
        elif self.reading and chat is not None and not chat.cancelling():
            chat.cancel()

    async def take(self, text: str) -> bool:
        """Obey a command or answer a message; False to end the chat."""
        word = text.strip()
        if text.startswith("/") and word[1:].isalpha():
            command = self._commands.get(word)
            if command is None:
                tell(f"There is no {word}; /help lists what there is.")
                return True
            return command()
        try:
            await self._answer(text)
        except (UsageError, DeadlineError) as error:  # of this message, not of the devices
            tell(f"edgellm: {error}")
        return True

    async def _answer(self, text: str) -> None:
        answer = await self._chat.answer(text)
        self._tell_of_dropping()
        pieces: list[str] = []
        task = self._answering = asyncio.create_task(stream(answer, pieces))
        try:
            await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            current = asyncio.current_task()
            if current is not None and current.cancelling():  # the whole command ends
                raise
        finally:
            self._answering = None
            if pieces:
                say("\n")
                self._chat.remember(text, "".join(pieces))
        if task.cancelled():
            tell("[stopped]")
            return
        self._last = answer.completion()
        tell(summary(self._last))
        if self._stats:
            self._show_stats()

    def _tell_of_dropping(self) -> None:
        if self._chat.left_out and not self._told_of_dropping:
            self._told_of_dropping = True
            tell(
                "The conversation has outgrown the context: from now on its oldest turns are"
                " left out."
            )

    def _help(self) -> bool:
        tell(HELP)
        return True

    def _clear(self) -> bool:
        self._chat.conversation.clear()
        tell("Forgotten.")
        return True

    def _show_stats(self) -> bool:
        if self._last is None:
            tell("There is no whole answer yet.")
        else:
            tell_with(who_did_what(self._last))
            if verdict := self._verdict():
                tell(f"Layers stay where they are: {verdict}.")
        return True
