"""Telling what a model thinks from what it says: ``<think>`` to ``</think>``. Pure.

Only at the beginning of an answer, where reasoning models think; a tag further on is text.
"""

from __future__ import annotations

import enum

from edgellm.api.holding import held_back

OPEN = "<think>"
CLOSE = "</think>"


class _State(enum.Enum):
    BEGINNING = 0
    THINKING = 1
    AFTER = 2
    """The thought has ended, and nothing but space came since."""
    SAYING = 3


class ReasoningSplitter:
    """Takes text as it is made; gives (thought, said)."""

    def __init__(self, *, opened: bool = False) -> None:
        """``opened``: the prompt ends with the tag, so that the answer begins with the thought."""
        self._state = _State.THINKING if opened else _State.BEGINNING
        self._held = ""
        self._thought = False

    def feed(self, text: str) -> tuple[str, str]:
        held, self._held = self._held + text, ""
        thought = ""
        if self._state is _State.BEGINNING:
            begun = held.lstrip()
            if begun.startswith(OPEN):
                self._state = _State.THINKING
                held = begun[len(OPEN) :]
            elif OPEN.startswith(begun):
                self._held = held
                return "", ""
            else:
                self._state = _State.SAYING
        if self._state is _State.THINKING:
            thought, held = self._think(held)
        if self._state is _State.AFTER:
            held = held.lstrip()
            if held:
                self._state = _State.SAYING
        return thought, held

    def _think(self, held: str) -> tuple[str, str]:
        if not self._thought:
            held = held.lstrip()
        at = held.find(CLOSE)
        if at >= 0:
            self._state = _State.AFTER
            return held[:at].rstrip(), held[at + len(CLOSE) :]
        # Space before the closing tag is not part of the thought either.
        keep = held_back(held, (CLOSE,))
        keep += len(held[: len(held) - keep]) - len(held[: len(held) - keep].rstrip())
        self._held = held[len(held) - keep :]
        thought = held[: len(held) - keep]
        self._thought = self._thought or bool(thought)
        return thought, ""

    def finish(self) -> tuple[str, str]:
        """What was held back when the answer ends."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state is _State.THINKING else ("", held)
