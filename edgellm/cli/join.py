"""``edgellm join``: run a node in the foreground until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from edgellm.cli import options as o
from edgellm.cli.output import emit, run, tell
from edgellm.node import Node, format_address
from edgellm.settings import LOOPBACK, NodeSettings, default_home


def join(
    name: o.Name = None,
    home: o.Home = None,
    listen: o.Listen = LOOPBACK,
    port: o.Port = 0,
    memory: o.Memory = None,
    threads: o.Threads = 0,
    pin: o.Pin = None,
    until_stdin_closes: o.UntilStdinCloses = False,
    as_json: o.Json = False,
) -> None:
    """Offer this device to others: hold stages of models until stopped with Ctrl-C."""

    async def work() -> None:
        node = Node(
            NodeSettings(
                name=name or socket.gethostname(),
                home=home or default_home(),
                listen=listen,
                port=port,
                memory_bytes=o.parse_size(memory),
                threads=threads,
                pin=o.parse_processors(pin),
            )
        )
        await node.start()
        try:
            host, bound = node.address
            address = format_address(host, bound)
            if as_json:
                emit({"name": node.settings.name, "id": node.device_id, "address": address})
            tell(_greeting(node.settings.name, address))
            await _until_told(until_stdin_closes)
        finally:
            await node.close()

    run(work, as_json)


def _greeting(name: str, address: str) -> str:
    return f"Device {name} is ready at {address}. It listens on this machine only."


async def _until_told(until_stdin_closes: bool) -> None:
    """Wait for Ctrl-C or SIGTERM (both cancel us) or, if asked, the end of standard input."""
    forever = asyncio.get_running_loop().create_future()
    if until_stdin_closes:
        descriptor = sys.stdin.fileno()

        def readable() -> None:
            if not os.read(descriptor, 4096) and not forever.done():
                forever.set_result(None)

        try:
            asyncio.get_running_loop().add_reader(descriptor, readable)
        except PermissionError:  # a plain file or /dev/null cannot be watched: it has ended
            return
    await forever
