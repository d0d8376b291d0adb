"""What was said so far. Pure: no input, no output, no model.

A conversation becomes the next prompt: chat messages for a model with a chat template, the text of
everything so far for one without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
