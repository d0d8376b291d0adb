"""``edgellm join``: run a node in the foreground until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace

from edgellm.cli import options as o
from edgellm.cli.asked import Device
from edgellm.cli.output import emit, run, tell
from edgellm.cli.spread import spread
from edgellm.discovery.addresses import format_address, parse_address
from edgellm.node import Node
from edgellm.runtime.neighbours import Event, Found, Lost, Unreachable
from edgellm.settings import NodeSettings


@spread
def join(
    device: Device,
    port: o.Port = 0,
    threads: o.Threads = 0,
    pin: o.Pin = None,
    until_stdin_closes: o.UntilStdinCloses = False,
    as_json: o.Json = False,
) -> None:
    """Offer this device to others: hold stages of models until stopped with Ctrl-C."""

    async def work() -> None:
        settings = replace(
            device.settings(threads),
            port=port,
            pin=o.parse_processors(pin),
            peers=tuple(map(parse_address, device.peer or ())),
        )
        news = _News()
        node = Node(settings, on_event=news.event, on_notice=news.say)
        await node.start()
        try:
            address = format_address(*node.address)
            if as_json:
                emit({"name": settings.name, "id": node.device_id, "address": address})
            tell(_greeting(settings, address, ours=until_stdin_closes))
            news.begin()
            await _until_told(until_stdin_closes)
        finally:
            await node.close()

    run(work, as_json)


def _greeting(settings: NodeSettings, address: str, *, ours: bool) -> str:
    """``ours``: another command of ours started it, and nobody has to be told what to do next."""
    ready = f"Device {settings.name} is ready at {address}."
    if ours:
        return ready
    if not settings.exposed:
        return (
            f"{ready} It listens on this machine only; with --listen 0.0.0.0 other machines can"
            " use it too.\nNow chat from another terminal: edgellm chat"
        )
    return (
        f"{ready}\nWARNING: there is no pairing and no encryption yet: anyone on this network can"
        " use this device and read what goes over it. Do so only where you trust everybody."
        "\nNow chat from any device here that has joined: edgellm chat"
    )


class _News:
    """What happens around the node, a line each on standard error. Nothing before ``begin``."""

    def __init__(self) -> None:
        self._early: list[str] | None = []

    def begin(self) -> None:
        """The greeting is out."""
        early, self._early = self._early or [], None
        for line in early:
            tell(line)

    def say(self, line: str) -> None:
        if self._early is None:
            tell(line)
        else:
            self._early.append(line)

    def event(self, event: Event) -> None:
        self.say(words_of(event))


def words_of(event: Event) -> str:
    """An event as a sentence or two."""
    match event:
        case Found():
            return f"Found device {event.name} at {event.address}."
        case Lost():
            return f"Lost device {event.name} at {event.address}: {event.problem}. Looking for it."
        case Unreachable(name="", device_id=""):
            return f"No device at {event.address} yet: {event.problem}. Trying on."
        case _:
            called = f"Device {event.name}" if event.name else "A device"
            return (
                f"{called} says that it is at {event.address}, but cannot be reached:"
                f" {event.problem}. Trying on; a firewall may be in the way."
            )


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
