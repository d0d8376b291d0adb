"""From a model's text to what a client sees: thoughts, words and tool calls. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.api.reasoning import ReasoningSplitter
from edgellm.api.toolstream import CallArgued, CallBegan, Said, ToolStream


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


Delta: TypeAlias = Said | Thought | CallBegan | CallArgued


class Plain:
    """Shows text as it is."""

    calls = 0
    closed = False

    def feed(self, text: str, token: int | None) -> list[Delta]:
        return [Said(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


@dataclass(slots=True)
class Shaper:
    """Shows the answer of a chat."""

    marks: Mapping[int, str]
    """Texts of control tokens that mean something here, by token."""
    reasoning: ReasoningSplitter
    tools: ToolStream | None = None

    @property
    def calls(self) -> int:
        return self.tools.calls if self.tools is not None else 0

    @property
    def closed(self) -> bool:
        """Nothing that follows would be shown."""
        return self.tools is not None and self.tools.closed

    def feed(self, text: str, token: int | None) -> list[Delta]:
        """What ``text`` shows, which ``token`` added (None: the rest of the last ones)."""
        if token is not None and token in self.marks:
            text = self.marks[token] + text
        thought, said = self.reasoning.feed(text)
        return self._shown(thought, said)

    def finish(self) -> list[Delta]:
        """The rest, when the answer ends."""
        found = self._shown(*self.reasoning.finish())
        return found + (list(self.tools.finish()) if self.tools is not None else [])

    def _shown(self, thought: str, said: str) -> list[Delta]:
        found: list[Delta] = [Thought(thought)] if thought else []
        if said and self.tools is not None:
            found += self.tools.feed(said)
        elif said:
            found.append(Said(said))
        return found
