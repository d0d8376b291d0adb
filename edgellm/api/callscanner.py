"""Reading one tool call while it is being written: its name, and its arguments as they come. Pure.

A call is a JSON object with ``name`` and ``arguments`` (or ``parameters``), in any order. The
arguments are passed on as they are written; a client puts them together again.
"""

from __future__ import annotations

import enum
import json

ARGUMENT_KEYS = ("arguments", "parameters")
MAX_NAME = 256


class _At(enum.Enum):
    OBJECT = 0
    KEY = 1
    COLON = 2
    VALUE = 3
    DONE = 4
    WRONG = 5


class CallScanner:
    """Feed it text; look at ``name``, take ``arguments``, until it is ``done`` or ``wrong``."""

    def __init__(self, name: str | None = None) -> None:
        """With a ``name`` the object is the arguments themselves."""
        self.name = name
        self.arguments = ""
        """Written since they were taken last."""
        self._bare = name is not None
        self._at = _At.OBJECT
        self._key = ""
        self._raw = ""
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def done(self) -> bool:
        return self._at is _At.DONE

    @property
    def wrong(self) -> bool:
        return self._at is _At.WRONG

    def feed(self, text: str) -> int:
        """Read ``text``; returns how much of it belonged to the call."""
        for index, character in enumerate(text):
            if self._at in (_At.DONE, _At.WRONG):
                return index
            self._take(character)
        return len(text)

    def _take(self, character: str) -> None:
        if self._at is _At.OBJECT:
            if character == "{":
                self._depth = 1
                self._at = _At.VALUE if self._bare else _At.KEY
                self.arguments += "{" if self._bare else ""
            elif not character.isspace():
                self._at = _At.WRONG
        elif self._bare:
            self._take_bare(character)
        elif self._at is _At.KEY:
            self._take_key(character)
        elif self._at is _At.COLON:
            if character == ":":
                self._at, self._raw = _At.VALUE, ""
            elif not character.isspace():
                self._at = _At.WRONG
        else:
            self._take_value(character)

    def _take_bare(self, character: str) -> None:
        self.arguments += character
        self._track(character)
        if not self._depth:
            self._at = _At.DONE

    def _take_key(self, character: str) -> None:
        if self._quoted:
            self._key += character
            if character == '"' and not self._escaped:
                self._quoted = False
                self._key = self._key[:-1]
                self._at = _At.COLON
            self._escaped = character == "\\" and not self._escaped
            if len(self._key) > MAX_NAME:
                self._at = _At.WRONG
        elif character == '"':
            self._key, self._quoted, self._escaped = "", True, False
        elif character == "}":
            self._at = _At.DONE if self.name is not None else _At.WRONG
        elif character != "," and not character.isspace():
            self._at = _At.WRONG

    def _track(self, character: str) -> None:
        """Where in the JSON text we are after this character."""
        if self._quoted:
            if character == '"' and not self._escaped:
                self._quoted = False
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._quoted, self._escaped = True, False
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _take_value(self, character: str) -> None:
        ends = not self._quoted and self._depth == 1 and character in ",}"
        if ends:
            self._end_value()
            if self._at is not _At.WRONG:
                self._at = _At.KEY
                if character == "}":
                    self._take_key(character)
            return
        self._track(character)
        if not self._depth:
            self._at = _At.WRONG
            return
        if not self._raw and character.isspace():
            return
        self._raw += character
        if self._key in ARGUMENT_KEYS and self._raw[0] != '"':
            self.arguments += character
        elif self._key == "name" and len(self._raw) > MAX_NAME:
            self._at = _At.WRONG

    def _end_value(self) -> None:
        raw = self._raw.rstrip()
        if self._key in ARGUMENT_KEYS:
            if raw.startswith('"'):  # an object within a text, as OpenAI writes it
                self.arguments += str(_loaded(raw) or "")
            elif not raw.startswith("{"):
                self._at = _At.WRONG
        elif self._key == "name":
            name = _loaded(raw)
            if isinstance(name, str) and name:
                self.name = name
            else:
                self._at = _At.WRONG

    def take_arguments(self) -> str:
        taken, self.arguments = self.arguments, ""
        return taken


def _loaded(raw: str) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
