"""Tool calls out of streamed text, in the syntax of the model that writes them. Pure.

What is not a call of one of the tools that were offered is text like any other, and is shown.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.api.callscanner import CallScanner
from edgellm.api.holding import first_mark, held_back

MAX_CALLS = 64
MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a family of models writes calls."""

    name: str
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    bare: bool = False
    """An answer that begins with a brace is a call."""
    named: bool = False
    """After an opening mark there may be a name and then the arguments alone."""
    arguments: str = "arguments"
    """The key that models of this family were taught."""


@dataclass(frozen=True, slots=True)
class Said:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegan:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArgued:
    index: int
    text: str


Delta: TypeAlias = Said | CallBegan | CallArgued


class _At(enum.Enum):
    BEGINNING = 0
    TEXT = 1
    BETWEEN = 2
    """Within marks, before a call or after one."""
    CALL = 3


class ToolStream:
    """Takes text as it is made; gives what is said and what is called."""

    def __init__(
        self,
        syntax: Syntax,
        names: frozenset[str],
        new_id: Callable[[], str],
        *,
        parallel: bool = True,
    ) -> None:
        self.calls = 0
        """Begun so far."""
        self.closed = False
        """No further call is wanted: the answer may end."""
        self._syntax = syntax
        self._names = names
        self._new_id = new_id
        self._parallel = parallel
        self._at = _At.BEGINNING
        self._held = ""
        self._raw = ""
        """Of what may turn out to be no call: since the last that was certain."""
        self._scanner = CallScanner()
        self._begun = False
        self._spoken = False

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        found: list[Delta] = []
        while self._held and not self.closed:
            before = (self._at, len(self._held))
            found += self._step()
            if (self._at, len(self._held)) == before:
                break
        return found

    def finish(self) -> list[Delta]:
        """The rest, when the answer ends. A call that has begun ends as it is."""
        rest, self._held = self._held, ""
        if self.closed:
            return []
        if self._at is _At.CALL:
            return [] if self._begun else self._say(self._raw + rest)
        if self._at is _At.BETWEEN:
            return self._say(self._raw + rest) if self._raw.strip() and not self.calls else []
        return self._say(rest.rstrip() if self.calls else rest)

    def _say(self, text: str) -> list[Delta]:
        self._raw = ""
        if not text or (not self._spoken and not text.strip()):
            return []
        self._spoken = True
        return [Said(text)]

    def _step(self) -> list[Delta]:
        if self._at is _At.BEGINNING:
            return self._begin()
        if self._at is _At.TEXT:
            return self._text()
        if self._at is _At.BETWEEN:
            return self._between()
        return self._call()

    def _begin(self) -> list[Delta]:
        begun = self._held.lstrip()
        if begun:
            self._at = _At.TEXT
            if self._syntax.bare and begun[0] == "{":
                self._at = _At.BETWEEN
        return []

    def _text(self) -> list[Delta]:
        marks = self._syntax.opens
        found = first_mark(self._held, marks)
        if found is not None:
            at, mark = found
            said = self._held[:at].rstrip()
            self._raw, self._held = mark, self._held[at + len(mark) :]
            self._at = _At.BETWEEN
            raw = self._raw
            deltas = self._say(said)
            self._raw = raw
            return deltas
        keep = held_back(self._held, marks)
        certain = self._held[: len(self._held) - keep]
        if marks:  # space before a mark is not said
            keep += len(certain) - len(certain.rstrip())
        said = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return self._say(said)

    def _between(self) -> list[Delta]:
        """Skip what stands around calls; find the next one, or the end of the marks."""
        rest = self._held.lstrip(" \t\r\n,;[]" if self.calls else " \t\r\n[")
        self._raw += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest:
            return []
        marks = (*self._syntax.opens, *self._syntax.closes)
        for mark in marks:
            if rest.startswith(mark):
                self._raw += mark
                self._held = rest[len(mark) :]
                if mark in self._syntax.closes:
                    self._at = _At.TEXT
                    self._raw = "" if self.calls else self._raw
                return [] if self.calls or self._at is _At.BETWEEN else self._say(self._raw)
        if rest[0] == "{":
            self._start(CallScanner())
            return []
        if any(mark.startswith(rest) for mark in marks):
            return []  # the beginning of a mark, perhaps
        if self._syntax.named and (rest[0].isalpha() or rest[0] == "_"):
            return self._named(rest)
        return self._no_call()

    def _named(self, rest: str) -> list[Delta]:
        name, brace, _ = rest.partition("{")
        if not brace:
            return [] if len(rest) <= MAX_NAME else self._no_call()
        self._raw += name
        self._held = rest[len(name) :]
        self._start(CallScanner(name.split("[", 1)[0].strip()))
        return []

    def _start(self, scanner: CallScanner) -> None:
        self._scanner, self._begun, self._at = scanner, False, _At.CALL

    def _no_call(self) -> list[Delta]:
        """It looked like a call, and is none."""
        text, self._held = self._raw + self._held, ""
        self._at = _At.TEXT
        if not self.calls:
            return self._say(text)
        self._held = text.lstrip()
        self._raw = ""
        return []

    def _call(self) -> list[Delta]:
        scanner = self._scanner
        used = scanner.feed(self._held)
        self._raw += self._held[:used]
        self._held = self._held[used:]
        found: list[Delta] = []
        if scanner.name is not None and not self._begun:
            if scanner.name not in self._names or self.calls >= MAX_CALLS:
                return self._no_call()
            self._begun = True
            found.append(CallBegan(self.calls, self._new_id(), scanner.name))
            self.calls += 1
        if self._begun and (arguments := scanner.take_arguments()):
            found.append(CallArgued(self.calls - 1, arguments))
        if scanner.wrong and not self._begun:
            return found + self._no_call()
        if scanner.done or scanner.wrong:
            self._at, self._raw = _At.BETWEEN, ""
            self.closed = not self._parallel
        return found
