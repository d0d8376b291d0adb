"""The devices that were reached lately, in ``peers.json`` of the home folder.

Blocking, but quick: a small file. What stands in it is checked like anything from outside, and a
file that is missing, damaged or too large means that nobody is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgellm.discovery.base import How, OnSighting, Sighting, sighting_from

FILE = "peers.json"
MAX_REMEMBERED = 64
MAX_FILE_BYTES = 256 * 1024
_FORMAT = 1


class KnownDevices:
    """Reads and writes the file; also a ``Discovery`` that sees everyone in it once."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE

    def load(self) -> tuple[Sighting, ...]:
        """Whom we knew, the latest first. Raises nothing."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                return ()
            # Absurd nesting and absurd numbers raise too, each in its own way.
            content = json.loads(data, parse_int=_short_integer)
        except (OSError, ValueError, RecursionError):
            return ()
        return parse_known(content)

    def save(self, devices: Iterable[Sighting]) -> None:
        """Replace the file: the old one or the new one is there, never half of one. A home that
        cannot be written only forgets."""
        entries = [
            {
                "id": each.device_id,
                "name": each.name,
                "addresses": [list(a) for a in each.addresses],
            }
            for each in devices
        ]
        content = {"format": _FORMAT, "devices": entries[:MAX_REMEMBERED]}
        with contextlib.suppress(OSError):
            descriptor, aside = tempfile.mkstemp(prefix=FILE, dir=self._path.parent)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                Path(aside).replace(self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(aside).unlink()
                raise

    async def start(self, on_sighting: OnSighting) -> None:
        for sighting in self.load():
            on_sighting(sighting)

    async def close(self) -> None:
        """Nothing runs."""


def parse_known(content: Any) -> tuple[Sighting, ...]:
    """The sightings in the content of a file; entries that cannot be used are left out."""
    devices = content.get("devices") if isinstance(content, dict) else None
    if not isinstance(devices, list):
        return ()
    found: dict[str, Sighting] = {}
    for entry in devices[:MAX_REMEMBERED]:
        if isinstance(entry, dict) and (sighting := _parse_entry(entry)) is not None:
            found.setdefault(sighting.device_id, sighting)
    return tuple(found.values())


def _parse_entry(entry: dict[Any, Any]) -> Sighting | None:
    listed = entry.get("addresses")
    addresses = listed if isinstance(listed, list) else []
    pairs = [tuple(each) for each in addresses if isinstance(each, list) and len(each) == 2]
    return sighting_from(entry.get("id"), entry.get("name"), pairs, How.KNOWN)


_MAX_DIGITS = 16


def _short_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("a number of absurd length")
    return int(text)
