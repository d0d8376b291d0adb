"""A command at a real pseudo-terminal, or with lines through a pipe, for the tests of chats."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster.processes import HANG_S, Ended, end_tree, environment

# Makes the terminal on standard input the one whose Ctrl-C reaches the command.
_CONTROL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
_START = _CONTROL + "os.execv(sys.executable, [sys.executable, '-m', 'edgellm', *sys.argv[1:]])"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def piped(text: str, *arguments: str, temp: Path) -> Ended:
    """Run ``edgellm ARGUMENTS`` with ``text`` on standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "edgellm", *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=environment(temp),
        cwd=temp,
        timeout=HANG_S,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


class Terminal:
    """``edgellm ARGUMENTS`` at a terminal of its own. Everything it writes is in ``screen``."""

    def __init__(self, *arguments: str, temp: Path, out: Path | None = None) -> None:
        """``out`` takes standard output in the terminal's place."""
        self.screen = ""
        self._seen = 0
        self._ours, self._its = os.openpty()
        self.found = self.settings
        with contextlib.ExitStack() as files:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                stdin=self._its,
                stdout=files.enter_context(out.open("wb")) if out else self._its,
                stderr=self._its,
                env=environment(temp) | {"TERM": "xterm", "COLUMNS": "200"},
                cwd=temp,
                start_new_session=True,
                # Tests that run in the background have Ctrl-C ignored, and it is inherited; whoever
                # sits at a terminal has not.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            end_tree(self.process.pid)
            self.process.wait()
        os.close(self._ours)
        os.close(self._its)

    @property
    def settings(self) -> list[Any]:
        """Echo, special characters and all the rest, as they are now."""
        return termios.tcgetattr(self._its)

    def send(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, words: str, within_s: float = 20.0) -> str:
        """What was written since the last call, up to and with ``words``."""
        end = time.monotonic() + within_s
        while words not in self.screen[self._seen :]:
            if time.monotonic() > end:
                raise TimeoutError(f"{words!r} did not come; since then: {self._new()!r}")
            self._read(0.05)
        at = self.screen.index(words, self._seen) + len(words)
        since, self._seen = self.screen[self._seen : at], at
        return since

    def ask(self, question: str, until: str = "]\r\n>>> ") -> str:
        """Type a question at the prompt; what comes until the next one."""
        self.send(question + "\r")
        return self.expect(until)

    def wait(self, seconds: float) -> None:
        """Let it go on for some time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._read(left)

    def read_some(self) -> int:
        """Take in what was written; characters of it that nobody expected yet."""
        self._read(0.01)
        return len(self._new())

    def ended(self, within_s: float = 20.0) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + within_s
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.02)  # or it would wait for room to write
        code = self.process.wait(0.1)
        with contextlib.suppress(OSError):
            self._read(0.05)
        return code

    def _new(self) -> str:
        return self.screen[self._seen :]

    def _read(self, seconds: float) -> None:
        while select.select([self._ours], [], [], seconds)[0]:
            self.screen += os.read(self._ours, 1 << 16).decode("utf-8", "replace")
            seconds = 0


@contextlib.contextmanager
def chatting(*arguments: str, temp: Path) -> Iterator[Terminal]:
    """A chat that has come to its first prompt."""
    with Terminal(*arguments, temp=temp) as terminal:
        terminal.expect(">>> ")
        yield terminal
