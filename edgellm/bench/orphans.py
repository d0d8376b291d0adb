"""A coordinator that is killed in the middle of an answer: its stages must free their memory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import psutil

from edgellm.bench.assaults import Assault
from edgellm.errors import DeviceError
from edgellm.localcluster import LocalCluster, command_environment

FREED_WITHIN_S = 30.0
LOADED_WITHIN_S = 60.0
STAGES = "a:0-4,b:4-8,c:8-12"
MODEL = "stub:12:delay=0.02"
_STAGE_MODULE = "edgellm.engine.stage_main"
_LOOK_AGAIN_S = 0.02


async def coordinators_killed(local: LocalCluster, count: int) -> Assault:
    """``count`` chats over the devices a, b and c, each killed with SIGKILL while it answers."""
    freed, worst = 0, 0.0
    for _ in range(count):
        async with _chat(local) as chat:
            loaded = lambda: len(_stages(local)) == STAGES.count(":")  # noqa: E731
            if await _until(loaded, LOADED_WITHIN_S) is None:
                raise DeviceError("the stages of a chat were not loaded in time.")
            chat.kill()
            took = await _until(lambda: not _stages(local), FREED_WITHIN_S)
        worst = max(worst, took or FREED_WITHIN_S)
        freed += took is not None
    return Assault("coordinator killed", count, freed, worst)


@contextlib.asynccontextmanager
async def _chat(local: LocalCluster) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command of the device that is paired with the others, in a process of its own."""
    command = [
        sys.executable, "-m", "edgellm", "chat", "--model", MODEL, "--stages", STAGES,
        "--prompt", "Once upon a time", "--max-tokens", "400", "--raw", "--json",
        "--home", str(local.home), "--name", "asker", "--listen", "127.0.0.1",
        "--no-discovery", "--no-probe",
    ]  # fmt: skip
    for address in local.addresses:
        command += ["--peer", address]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=command_environment(),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _stages(local: LocalCluster) -> list[psutil.Process]:
    """The stage processes of all nodes."""
    found = []
    for node in local.nodes:
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(node.process.pid).children()
            found += [each for each in children if _STAGE_MODULE in _command_of(each)]
    return found


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


async def _until(condition: Callable[[], bool], within_s: float) -> float | None:
    """Seconds until the condition held; None where it did not in time."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > within_s:
            return None
        await asyncio.sleep(_LOOK_AGAIN_S)
    return time.perf_counter() - began
