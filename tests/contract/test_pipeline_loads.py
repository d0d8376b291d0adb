"""Loads that fail or are given up: the device is named, and no stage and no file stays."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgellm.client import LoadOptions, plan_over
from edgellm.errors import DeviceError, PeerLostError
from edgellm.modelfile.gguf import read_header
from edgellm.modelref import open_reference
from edgellm.store.assembly import Assembly
from edgellm.store.cache import ShardCache
from tests.contract.test_pipeline import LAYERS, SPLITS, loaded
from tests.contract.test_pipeline_faults import inline_three
from tests.inline import until
from tests.tinymodels import write_tiny_model


@pytest.mark.parametrize("device", ["a", "b", "c"])
async def test_a_device_that_vanishes_while_loading(tmp_path: Path, device: str) -> None:
    async with inline_three(tmp_path, pace_s=0.2) as (cluster, network):

        async def load() -> None:
            async with loaded(cluster, SPLITS[4]):
                pytest.fail("it must not load")

        task = asyncio.create_task(load())
        await until(lambda: len(cluster.all_stages) == 3)
        network.cut(device)
        with pytest.raises(DeviceError) as caught:
            await task
        assert caught.value.device == device
        await until(lambda: cluster.hosted == 0 and all(s.ended for s in cluster.all_stages))


async def test_a_load_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    async with inline_three(tmp_path, pace_s=0.2) as (cluster, _):

        async def load() -> None:
            async with loaded(cluster, SPLITS[4]):
                pytest.fail("it must not load")

        task = asyncio.create_task(load())
        await until(lambda: len(cluster.all_stages) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: cluster.hosted == 0 and all(s.ended for s in cluster.all_stages))


async def test_a_load_that_is_given_up_while_it_copies_leaves_no_lock_and_no_half_file(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread cannot be stopped: what it makes after the end of the load must be given back."""
    path = write_tiny_model("llama", model_dir)
    began, made = threading.Event(), threading.Event()
    assemble = ShardCache.assemble

    def slowly(self: ShardCache, *arguments: Any, **named: Any) -> Assembly:
        began.set()
        time.sleep(0.3)
        named["cancel"] = None  # as if the load had been given up just too late for it
        assembly = assemble(self, *arguments, **named)
        made.set()
        return assembly

    async with inline_three(tmp_path) as (cluster, _):

        async def load() -> None:
            async with loaded(cluster, "a:0-3,b:3-5", model=str(path)):
                pass

        with monkeypatch.context() as patched:
            patched.setattr(ShardCache, "assemble", slowly)
            task = asyncio.create_task(load())
            await until(began.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(made.is_set)
            await until(lambda: cluster.hosted == 0)
        await load()  # whoever comes next finds no lock
    for shard in tmp_path.rglob("shards/*.gguf"):  # noqa: ASYNC240 - nothing else runs any more
        read_header(shard)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (DeviceError("the disk is full."), "the disk is full"),
        (RuntimeError("a bug"), "internal error: RuntimeError: a bug"),
    ],
)
async def test_a_load_that_fails_on_one_device_is_told_and_leaves_nothing(
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Exception,
    words: str,
) -> None:
    path = write_tiny_model("llama", model_dir)
    assemble = ShardCache.assemble

    def fail(self: ShardCache, *arguments: Any, **named: Any) -> Assembly:
        if self._files.folder.parent.name == "b":
            raise broken
        return assemble(self, *arguments, **named)

    monkeypatch.setattr(ShardCache, "assemble", fail)
    async with inline_three(tmp_path) as (cluster, _):
        with pytest.raises(DeviceError, match=words) as caught:
            async with loaded(cluster, "a:0-3,b:3-5", model=str(path)):
                pytest.fail("it must not load")
        assert caught.value.device == "b"
        await until(lambda: cluster.hosted == 0)


async def test_a_device_that_is_gone_before_the_load_is_named(tmp_path: Path) -> None:
    async with inline_three(tmp_path) as (cluster, network):
        opened = open_reference(f"stub:{LAYERS}")
        plan = plan_over(
            opened, cluster.client.offers(opened.engine), LoadOptions(stages=SPLITS[4])
        )
        network.cut("b")
        await until(lambda: len(cluster.client.devices()) == 2)
        with pytest.raises(PeerLostError) as caught:
            async with cluster.client.load(opened, plan=plan):
                pytest.fail("it must not load")
        assert caught.value.device == "b"
        assert cluster.hosted == 0
