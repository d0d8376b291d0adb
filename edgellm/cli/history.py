"""What was typed before, in a file of the home folder that only its owner may read.

One JSON string a line, so that a message of several lines is one entry. An entry is written as
soon as it is typed. A history that cannot be read or written is no reason not to chat.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

FILE_NAME = "chat_history"
MAX_ENTRIES = 500
MAX_BYTES = 1 << 20
"""A file that outgrew this is cut to its newest entries."""
MAX_ENTRY = 16 << 10
"""Characters; a longer message is not kept."""


class History:
    """Entries, oldest first. Without a ``home`` they last as long as the command."""

    def __init__(self, home: Path | None) -> None:
        self._path = home / FILE_NAME if home else None
        self.entries = self._read(self._path) if self._path else []

    def add(self, entry: str) -> bool:
        """Keep ``entry``; False for what is not kept: empty, too long, the last one again."""
        if not entry.strip() or len(entry) > MAX_ENTRY or self.entries[-1:] == [entry]:
            return False
        self.entries.append(entry)
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._write(self._path, [entry], os.O_APPEND)
        return True

    def _read(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MAX_BYTES))
                lines = file.read(MAX_BYTES).splitlines()
        except OSError:
            return []
        entries = [entry for line in lines if (entry := _entry(line))]
        if size > MAX_BYTES or len(lines) > 2 * MAX_ENTRIES:
            self._shorten(path, entries[-MAX_ENTRIES:])
        return entries[-MAX_ENTRIES:]

    def _shorten(self, path: Path, entries: list[str]) -> None:
        """By a new file in the old one's place: never half a file."""
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            self._write(aside, entries, os.O_EXCL)
            aside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()

    @staticmethod
    def _write(path: Path, entries: list[str], how: int) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        try:
            os.write(descriptor, text.encode("ascii"))
        finally:
            os.close(descriptor)


def _entry(line: bytes) -> str:
    """The text of a line of the file; empty for one that is not ours."""
    try:
        entry = json.loads(line)
    except ValueError:
        return ""
    return entry if isinstance(entry, str) else ""
