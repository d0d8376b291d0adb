"""llama.cpp's own server over RPC servers: started, asked for streams of tokens, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from edgellm.bench.plain import shares
from edgellm.bench.rpcbuild import RpcBuild
from edgellm.bench.rpcservers import HOST, free_port
from edgellm.engine.child import Child
from edgellm.errors import DeviceError
from edgellm.localcluster import our_processors

START_WITHIN_S = 120.0
RUN_WITHIN_S = 600.0
MAX_LINE_BYTES = 1 << 20
_LOOK_AGAIN_S = 0.1
_EVENT = b"data: "


@dataclass(frozen=True, slots=True)
class Served:
    """What one stream brought: at which times it had how many tokens, by ``time.perf_counter``."""

    times: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """One that runs."""

    port: int

    async def stream(self, prompt: Sequence[int], count: int) -> Served:
        """``count`` tokens greedily. Raises DeviceError for an answer that is none."""
        body = {
            "prompt": list(prompt),
            "n_predict": count,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        times: list[float] = []
        counts: list[int] = []
        async with asyncio.timeout(RUN_WITHIN_S), self._asked("POST", "/completion", body) as lines:
            async for line in lines:
                if not line.startswith(_EVENT):
                    continue
                event = json.loads(line[len(_EVENT) :])
                if event.get("stop"):
                    break
                times.append(time.perf_counter())
                counts.append(int(event["tokens_predicted"]))
        if len(times) < 2:
            raise DeviceError("llama-server gave no stream of tokens.")
        return Served(tuple(times), tuple(counts))

    async def ready(self) -> bool:
        """Whether it has the model and takes requests."""
        with contextlib.suppress(OSError, DeviceError):
            async with self._asked("GET", "/health", None):
                return True
        return False

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: object
    ) -> AsyncIterator[asyncio.StreamReader]:
        """The lines of an answer, behind its head."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(HOST, self.port, limit=MAX_LINE_BYTES)
        try:
            writer.write(head.encode() + data)
            status = (await reader.readline()).split()
            if len(status) < 2 or status[1] != b"200":
                raise DeviceError(f"llama-server answered {b' '.join(status[1:2]).decode()!r}.")
            yield reader
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def llama_server(
    build: RpcBuild,
    path: str,
    servers: Sequence[str],
    *,
    ends: Sequence[int],
    streams: int,
    context: int,
) -> AsyncIterator[LlamaServer]:
    """The model at ``path`` over RPC ``servers`` (``HOST:PORT``), each with the layers up to its
    number in ``ends``; ``context`` KV cells for each of ``streams``. It computes no layer itself.

    Raises DeviceError where it does not start.
    """
    port = free_port()
    arguments = [
        "--model", path, "--rpc", ",".join(servers), "--n-gpu-layers", "999",
        "--tensor-split", ",".join(map(str, shares(ends))), "--fit", "off",
        "--parallel", str(streams), "--ctx-size", str(context * streams), "--flash-attn", "on",
        "--threads", "1", "--host", HOST, "--port", str(port),
        "--no-webui", "--cache-ram", "0", "--offline",
    ]  # fmt: skip
    processors = ",".join(map(str, our_processors()))
    child = await Child.start(
        "edgellm.bench.pinned",
        name="llama-server",
        arguments=[processors, str(build.serving), *arguments],
    )
    try:
        server = LlamaServer(port)
        await _serving(child, server)
        yield server
    finally:
        await child.stop()


async def _serving(child: Child, server: LlamaServer) -> None:
    try:
        async with asyncio.timeout(START_WITHIN_S):
            while child.exit is None:
                if await server.ready():
                    return
                await asyncio.sleep(_LOOK_AGAIN_S)
    except TimeoutError as error:
        raise DeviceError("llama-server did not start in time.") from error
    raise DeviceError(f"llama-server {child.exit.reason}.")
