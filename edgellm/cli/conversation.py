"""What was said so far, and what was typed. Pure: no input, no output, no model.

A conversation becomes the next prompt: chat messages for a model with a chat template, the text of
everything so far for one without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    asked: str
    answered: str


class Conversation:
    """Turns, oldest first, and the question that is being answered.

    ``templated``: the model takes chat messages. Otherwise its text is continued as it is.
    """

    def __init__(self, *, templated: bool, system: str | None = None) -> None:
        self.templated = templated
        self.system = system
        self.turns: list[Turn] = []

    def prompt(self, question: str) -> str | list[dict[str, Any]]:
        """What the model is given so that it answers ``question``."""
        if not self.templated:
            begin = f"{self.system}\n" if self.system else ""
            said = "".join(turn.asked + turn.answered + "\n" for turn in self.turns)
            return begin + said + question
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.asked})
            messages.append({"role": "assistant", "content": turn.answered})
        return [*messages, {"role": "user", "content": question}]

    def add(self, asked: str, answered: str) -> None:
        self.turns.append(Turn(asked, answered))

    def drop_oldest(self) -> bool:
        """Forget the oldest turn; False if there is none. The system message stays."""
        if not self.turns:
            return False
        del self.turns[0]
        return True

    def clear(self) -> None:
        self.turns.clear()


class Message:
    """One message from typed lines: goes on after a backslash at a line's end, and between two
    triple quotes."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._quoted = False

    @property
    def begun(self) -> bool:
        """Whether the next line belongs to a message that has begun."""
        return bool(self._lines) or self._quoted

    def feed(self, line: str) -> str | None:
        """The whole message if ``line`` ends it, else None."""
        if not self.begun and line.lstrip().startswith(_QUOTES):
            self._quoted = True
            line = line.lstrip().removeprefix(_QUOTES)
            if not line:
                return None
        if self._quoted:
            if line.rstrip().endswith(_QUOTES):
                last = line.rstrip().removesuffix(_QUOTES)
                return self._end(*([last] if last else []))
            self._lines.append(line)
            return None
        if line.endswith("\\"):
            self._lines.append(line[:-1])
            return None
        return self._end(line)

    def _end(self, *last: str) -> str:
        text = "\n".join([*self._lines, *last])
        self.drop()
        return text

    def rest(self) -> str:
        """What was typed of a message whose end did not come."""
        return self._end()

    def drop(self) -> None:
        """Forget what was typed of a message that has not ended."""
        self._lines.clear()
        self._quoted = False
