"""Where this device serves: what ``serve`` leaves in its home, so that other commands of the same
home use the models that it has loaded instead of loading them again.

The file holds the key, so it is for its owner alone. It is a hint: whoever reads it asks the
server, which may be gone. Nothing here needs the packages of the extra ``serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import DeviceError, EdgeError, UsageError

FILE = "serving.json"
ASK_WITHIN_S = 2.0
_LINE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A server of this device that runs."""

    host: str
    port: int
    key: str | None

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    async def loaded(self) -> dict[str, str]:
        """Names of the models that it has loaded, by their digests; empty where nobody answers."""
        try:
            async with asyncio.timeout(ASK_WITHIN_S):
                lines = [line async for line in self._lines("GET", "/v1/models", None)]
            told = json.loads("\n".join(lines))
            return {
                str(each["digest"]): str(each["id"]) for each in told["data"] if "digest" in each
            }
        except (OSError, TimeoutError, ValueError, KeyError, TypeError, EdgeError):
            return {}

    async def events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer. Leaving early ends it. Raises RefusedError, and
        DeviceError where the server is gone."""
        ended = False
        async with contextlib.aclosing(self._lines("POST", path, body)) as lines:
            async for line in lines:
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    made = json.loads(line.removeprefix("data: "))
                    if "error" in made:
                        raise RefusedError(made["error"])
                    yield made
        if not ended:  # nor was there an error
            raise DeviceError("the server ended in the middle of the answer.")

    async def _lines(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncGenerator[str, None]:
        """The lines of a response. As HTTP 1.0, so that its end is the connection's."""
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {path} HTTP/1.0",
            f"Host: {self.url.removeprefix('http://')}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
        ]
        if self.key is not None:
            head.append(f"Authorization: Bearer {self.key}")
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=_LINE_BYTES)
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + data)
            status = (await reader.readline()).split()
            while (await reader.readline()).strip():
                pass
            if len(status) < 2 or status[1] != b"200":
                raise RefusedError(_error_in(await reader.read(1 << 16)))
            while line := await reader.readline():
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        finally:
            writer.close()


class RefusedError(DeviceError):
    """The server answered with an error; ``reason`` is its code."""

    code = "refused"

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__(str(told.get("message", "the server refused the request."))[:2000])
        self.reason = str(told.get("code"))


def _error_in(body: bytes) -> Mapping[str, Any]:
    try:
        told = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


def server_of(home: Path) -> Elsewhere | None:
    """The server that was announced in a home; it may be gone."""
    try:
        told = json.loads((home / FILE).read_text(encoding="utf-8"))
        return Elsewhere(str(told["host"]), int(told["port"]), told.get("key"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def announced(home: Path, host: str, port: int, key: str | None) -> Iterator[None]:
    """Let other commands of this home know of a server, while it runs."""
    path, aside = home / FILE, home / f"{FILE}.{os.getpid()}"
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    told = json.dumps({"host": here, "port": port, "key": key})
    try:
        home.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(told)
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{home} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == told:  # not another server's by now
                path.unlink()
