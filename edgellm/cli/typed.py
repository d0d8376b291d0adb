"""Messages from typed lines. Pure: no input, no output."""

from __future__ import annotations

_QUOTES = '"""'


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
