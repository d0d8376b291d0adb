"""Lines that a person types, or that come through a pipe, without keeping the event loop waiting.

This file knows terminals and threads and nothing of models. Lines are read in a thread that may
be left behind (a read cannot be interrupted); it holds no lock, and the terminal is put back.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

from edgellm.cli.history import History

_MARK = "\x03"
_READ_BYTES = 1 << 16
_END_OF_PASTING = b"\x1b[?2004l"


class DroppedError(Exception):
    """Ctrl-C at the prompt. ``empty`` says whether nothing had been typed."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.empty = empty


class Lines(Protocol):
    """Where lines come from."""

    @property
    def typed(self) -> bool:
        """Whether a person types them."""
        ...

    async def read(self, prompt: str) -> str:
        """The next line, without its end. Raises EOFError after the last one, DroppedError."""
        ...

    def remember(self, entry: str) -> None:
        """Keep a message for the arrow keys, now and next time."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


def nothing_to_read() -> bool:
    """Whether standard input can give no lines: closed, or a device such as /dev/null."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return True
    return stat.S_ISCHR(mode) and not os.isatty(0)


def open_lines(history: Callable[[], History]) -> Lines:
    """Editable lines where standard input and output are a terminal, else lines as they come."""
    if os.isatty(0) and os.isatty(1):
        with contextlib.suppress(ImportError):  # no readline on Windows
            import readline  # noqa: PLC0415

            return EditedLines(readline, history())
    return PlainLines(typed=os.isatty(0))


class PlainLines:
    """Lines of standard input as they come: from a pipe, a file, a terminal without editing."""

    def __init__(self, *, typed: bool) -> None:
        self._typed = typed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._ended = False

    @property
    def typed(self) -> bool:
        return self._typed

    async def read(self, prompt: str) -> str:
        if self._typed:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        # A terminal's end (Ctrl-D) is an end for one read only: do not ask again.
        while "\n" not in self._held and not self._ended:
            data = await in_thread(_read_some)
            self._ended = not data
            self._held += self._decoder.decode(data, final=self._ended)
        line, _, self._held = self._held.partition("\n")
        if self._ended and not line and not self._held:
            raise EOFError
        return line.removesuffix("\r")

    def remember(self, entry: str) -> None:
        """A pipe needs no memory."""

    def close(self) -> None:
        """Nothing was changed."""


class EditedLines:
    """Lines edited with readline, with the history of earlier chats.

    While a line is read, Ctrl-C is a key like others (where this is GNU readline): it ends the
    line with a mark at its beginning. As a signal it would reach the main thread, which knows
    nothing of the line, and could not reach the one that reads.
    """

    def __init__(self, readline: ModuleType, history: History) -> None:
        self._readline = readline
        self._history = history
        self._terminal = _Terminal()
        self._gnu = "libedit" not in (readline.__doc__ or "")
        readline.set_auto_history(False)
        readline.parse_and_bind("tab: tab-insert" if self._gnu else "bind ^I ed-insert")
        if self._gnu:
            readline.parse_and_bind(r'"\C-c": "\C-a\C-v\C-c\C-m"')
        for entry in history.entries:
            readline.add_history(entry)

    @property
    def typed(self) -> bool:
        return True

    async def read(self, prompt: str) -> str:
        with self._terminal.without_interrupt() if self._gnu else contextlib.nullcontext():
            line: str = await in_thread(lambda: input(prompt))
        if line.startswith(_MARK):
            raise DroppedError(empty=not line.removeprefix(_MARK))
        return line

    def remember(self, entry: str) -> None:
        if self._history.add(entry):
            self._readline.add_history(entry)

    def close(self) -> None:
        self._terminal.put_back()


class _Terminal:
    """The settings of the terminal on standard input, as they were found."""

    def __init__(self) -> None:
        import termios  # noqa: PLC0415 - POSIX only, as readline

        self._termios: Any = termios
        self._found = termios.tcgetattr(0)
        self._reading = False

    @contextlib.contextmanager
    def without_interrupt(self) -> Iterator[None]:
        """Within, Ctrl-C is a character and no signal."""
        changed = self._termios.tcgetattr(0)
        changed[6][self._termios.VINTR] = os.fpathconf(0, "PC_VDISABLE")
        self._termios.tcsetattr(0, self._termios.TCSADRAIN, changed)
        self._reading = True
        yield  # if this raises, the line is still being read: put_back is what helps
        self._reading = False
        self._termios.tcsetattr(0, self._termios.TCSADRAIN, self._found)

    def put_back(self) -> None:
        with contextlib.suppress(self._termios.error, OSError):  # the terminal may be gone
            self._termios.tcsetattr(0, self._termios.TCSADRAIN, self._found)
            if self._reading:  # readline was not asked to tidy up
                os.write(1, _END_OF_PASTING + b"\r\n")


def _read_some() -> bytes:
    return os.read(0, _READ_BYTES)


async def in_thread(read: Callable[[], Any]) -> Any:
    """What ``read`` returns or raises, from a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(value: object, error: BaseException | None) -> None:
        if result.done():
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def work() -> None:
        value, problem = None, None
        try:
            value = read()
        except (EOFError, OSError, ValueError) as error:
            problem = error if isinstance(error, EOFError) else EOFError()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=work, name="lines", daemon=True).start()
    return await result
