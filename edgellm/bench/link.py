"""A bench over a network of a given speed: the same command again, in a network namespace of its
own whose loopback is no faster than that. Needs Linux, root, and iproute2 (``ip``, ``tc``).

Processes and processors stay the same; only what they send each other is slowed down. The delay of
a real network is not there (the kernel's netem would be needed): only its bandwidth.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

from edgellm.errors import DeviceError, UsageError

RATE = re.compile(r"[1-9][0-9]{0,5}(kbit|mbit|gbit)")
MTU = "1500"
"""As Ethernet and Wi-Fi have it; loopback's own packets would be too large for a small burst."""
BURST = "16kb"
"""What may leave at once: little, so that a message takes the time that it takes on a wire."""
QUEUE = "200ms"
SETUP_WITHIN_S = 20.0
OPTION = "--link"
_TWIN = "EDGELLM_LINK"


def check_rate(rate: str) -> str:
    """A rate as ``tc`` takes it, such as ``100mbit``. Raises UsageError."""
    if not RATE.fullmatch(rate.lower()):
        raise UsageError(
            f"{rate[:40]!r} is no speed of a network.", hint="Write it as 100mbit or 1gbit."
        )
    return rate.lower()


@contextlib.asynccontextmanager
async def slow_loopback(rate: str) -> AsyncIterator[str]:
    """The name of a network namespace that has only a loopback of this speed.

    Raises DeviceError where the system does not let us.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise DeviceError(
                f"a slower network needs Linux and {tool!r}.", hint="Install iproute2."
            )
    name = f"edgellm-bench-{os.getpid()}-{secrets.token_hex(3)}"
    await _run("ip", "netns", "add", name)
    try:
        await _run("ip", "-n", name, "link", "set", "lo", "mtu", MTU, "up")
        shape = ["root", "tbf", "rate", rate, "burst", BURST, "latency", QUEUE]
        await _run("tc", "-n", name, "qdisc", "add", "dev", "lo", *shape)
        yield name
    finally:
        await asyncio.shield(_run("ip", "netns", "del", name))


def without_link(arguments: Sequence[str]) -> list[str]:
    """A command line without ``--link RATE``."""
    left: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != OPTION and not argument.startswith(f"{OPTION}="):
            left.append(argument)
        skip = argument == OPTION
    return left


async def run_inside(namespace: str, arguments: Sequence[str]) -> int:
    """Run ``edgellm ARGUMENTS`` in there, with our input and output; its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != _TWIN}
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", namespace, sys.executable, "-m", "edgellm", *arguments,
        env=environment,
    )  # fmt: skip
    try:
        return await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(SETUP_WITHIN_S):
        _, said = await process.communicate()
    if process.returncode:
        problem = said.decode("utf-8", "replace").strip()[:200]
        raise DeviceError(
            f"a slower network cannot be made here: {problem or command}.",
            hint="It needs root, and a kernel with network namespaces and tbf.",
        )
