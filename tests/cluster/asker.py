"""Asks a cluster for one answer and says each token as it comes: for tests that disturb it.

``python -m tests.cluster.asker '{"home": ..., "peers": [...], "model": ..., ...}'`` prints a JSON
object a line: ``{"token": ID, "at": SECONDS}`` by the monotonic clock, which all processes of a
machine share, and at the end the answer as ``chat --json`` has it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from edgellm.client import Cluster, GenerateOptions, LoadOptions
from edgellm.runtime.peers import Link
from edgellm.types import SamplerSettings


class Unmeasured(Cluster):
    """Does not measure links: the plan is told, and the megabytes would only be in the way."""

    async def links(self) -> list[Link]:
        return []


def say(said: dict[str, Any]) -> None:
    print(json.dumps(said), flush=True)


async def ask(asked: dict[str, Any]) -> None:
    options = LoadOptions(stages=asked["stages"], exact=True, context=asked["context"])
    wanted = GenerateOptions(
        max_tokens=asked["tokens"],
        sampler=SamplerSettings(temperature=0.0),
        raw=True,
        ignore_eos=True,
    )
    clock = asyncio.get_running_loop().time
    async with (
        Unmeasured.connect(asked["peers"], home=Path(asked["home"])) as cluster,
        cluster.load(asked["model"], options) as model,
    ):
        answer = model.answer(asked["prompt"], wanted)
        async for piece in answer.pieces():
            if piece.made is not None:
                say({"token": piece.made.token, "at": clock()})
        say(answer.completion().to_dict())


if __name__ == "__main__":
    asyncio.run(ask(json.loads(sys.argv[1])))
