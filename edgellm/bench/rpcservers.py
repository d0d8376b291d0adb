"""llama.cpp's RPC servers on this machine: started, pinned, reachable, ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from edgellm.bench.rpcbuild import RpcBuild
from edgellm.engine.child import Child
from edgellm.errors import DeviceError
from edgellm.localcluster import LocalDevice

HOST = "127.0.0.1"
START_WITHIN_S = 30.0
_LOOK_AGAIN_S = 0.05


@contextlib.asynccontextmanager
async def rpc_servers(
    build: RpcBuild, devices: Sequence[LocalDevice], cache: Path | None = None
) -> AsyncIterator[list[str]]:
    """A server for each device, as ``HOST:PORT``; with ``cache``, a folder where they keep tensors.

    Raises DeviceError for a server that does not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for device in devices:
            port = free_port()
            child = await _start(build, device, port, cache)
            stack.push_async_callback(child.stop)
            await _listening(child, port, device)
            addresses.append(f"{HOST}:{port}")
        yield addresses


async def _start(build: RpcBuild, device: LocalDevice, port: int, cache: Path | None) -> Child:
    processors = ",".join(map(str, device.pin))
    arguments = [
        "--device", "CPU", "--threads", str(device.threads), "--host", HOST, "--port", str(port),
    ]  # fmt: skip
    environment = {}
    if cache is not None:
        # Each its own: on two machines they would not find each other's tensors either.
        environment["LLAMA_CACHE"] = str(cache / device.name)
        arguments.append("--cache")
    return await Child.start(
        "edgellm.bench.pinned",
        name=f"the RPC server on {device.name}",
        arguments=[processors, str(build.server), *arguments],
        environment=environment,
    )


async def _listening(child: Child, port: int, device: LocalDevice) -> None:
    """Wait until the server takes connections. It serves one at a time; ours is over at once."""
    try:
        async with asyncio.timeout(START_WITHIN_S):
            while child.exit is None:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(HOST, port)
                    writer.close()
                    return
                await asyncio.sleep(_LOOK_AGAIN_S)
    except TimeoutError as error:
        raise DeviceError("its RPC server did not start in time.", device=device.name) from error
    raise DeviceError(f"its RPC server {child.exit.reason}.", device=device.name)


def free_port() -> int:
    """llama.cpp's server cannot choose one itself. Another process may take it first: it will then
    say so, and end."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
