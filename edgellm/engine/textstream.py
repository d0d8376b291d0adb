"""Text out of streamed bytes: whole characters, and nothing of a stop string. Pure.

A token is any run of bytes, so characters and stop strings may begin in one token and end in
another. Both classes give the same text however the input is cut into pieces.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from edgellm.errors import UsageError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000


class IncrementalDecoder:
    """UTF-8 bytes to text. An unfinished character waits; an impossible one becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What an unfinished character at the end of the stream amounts to: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts streamed text before a stop string; holds back no more than might begin one.

    The stop string that is complete first wins; of those complete at the same character, the
    longest. Raises UsageError for empty, too many or too long stop strings.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if len(self._stops) > MAX_STOPS:
            raise UsageError(f"{len(self._stops)} stop strings are too many.")
        for stop in self._stops:
            if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
                raise UsageError(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters.")
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None so far."""
        return self._matched

    def feed(self, text: str) -> str:
        """Take the next text; return what is certain to be shown. Nothing after a match."""
        if self._matched is not None:
            return ""
        held = self._held + text
        match = self._first_match(held)
        if match is not None:
            start, self._matched = match
            self._held = ""
            return held[:start]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
