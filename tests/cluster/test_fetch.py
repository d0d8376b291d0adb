"""Shards reach devices that do not have the model: by piece, verified, from whoever holds them.

Real node processes over TCP. The coordinator tells no path, as it does to devices that are not on
its own machine, so everything that a node lacks goes over the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edgellm.answer import GenerateOptions, LoadOptions
from edgellm.client import Cluster
from edgellm.errors import FetchError, PeerLostError
from edgellm.localcluster import LocalCluster, local_cluster, local_devices
from edgellm.modelfile import read_card
from edgellm.modelfile.cut import embedding_recipe, shard_recipe
from edgellm.runtime.session import Session
from edgellm.runtime.shares import Shares
from edgellm.types import LayerSpan, SamplerSettings
from tests import tinymodels
from tests.inline import until

STORIES = "stories260K-f32.gguf"
OPTIONS = GenerateOptions(max_tokens=40, sampler=SamplerSettings(temperature=0.0), raw=True)
PROMPT = "Once upon a time"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices seem to be on other machines: no path is told."""
    monkeypatch.setattr(Session, "local", property(lambda session: False))


@contextlib.asynccontextmanager
async def devices(home: Path, count: int) -> AsyncIterator[LocalCluster]:
    """Nodes a, b, ... whose homes stay."""
    made = local_devices(count, memory_bytes=4 << 30, processors=range(count), pin=False)
    kept = [dataclasses.replace(device, home=home / device.name) for device in made]
    async with local_cluster(kept) as local:
        yield local


@contextlib.asynccontextmanager
async def connected(local: LocalCluster) -> AsyncIterator[Cluster]:
    async with Cluster.connect(local.addresses, home=local.home) as cluster:
        yield cluster


def span_bytes(path: Path, first: int, end: int) -> int:
    """What the stage of these layers is made of; equal tensors count once, whatever their names."""
    model = read_card(path).model
    recipes = [shard_recipe(model, LayerSpan(first, end))]
    if first == 0 and end < model.layers:
        recipes.append(embedding_recipe(model))
    names = {tensor.source for recipe in recipes for tensor in recipe.tensors if tensor.source}
    return sum(map(len, {model.read(name) for name in names}))


async def load(cluster: Cluster, path: Path, stages: str) -> tuple[list[dict[str, float]], str]:
    """(what loading each stage took, the greedy answer)."""
    options = LoadOptions(stages=stages, exact=True, context=256)
    async with cluster.load(str(path), options) as model:
        answer = await model.complete(PROMPT, OPTIONS)
        return list(model.pipeline.loads), answer.text


async def test_a_worker_gets_its_spans_bytes_and_the_second_load_none(
    tmp_path: Path, shared_models: Path
) -> None:
    path = shared_models / STORIES
    async with devices(tmp_path, 2) as local, connected(local) as cluster:
        first, text = await load(cluster, path, "a:0-3,b:3-5")
        for figures, span in zip(first, ((0, 3), (3, 5)), strict=True):
            assert figures["fetched_bytes"] == span_bytes(path, *span)
            assert figures["from:coordinator"] == figures["fetched_bytes"]
        again, same = await load(cluster, path, "a:0-3,b:3-5")
        assert [figures["fetched_bytes"] for figures in again] == [0, 0]
        assert same == text
    async with devices(tmp_path, 2) as local, connected(local) as cluster:  # started anew
        later, same = await load(cluster, path, "a:0-3,b:3-5")
        assert [figures["fetched_bytes"] for figures in later] == [0, 0]
        assert same == text


async def test_a_boundary_moved_by_one_layer_moves_one_layers_bytes(
    tmp_path: Path, shared_models: Path
) -> None:
    path = shared_models / STORIES
    async with devices(tmp_path, 2) as local, connected(local) as cluster:
        await load(cluster, path, "a:0-3,b:3-5")
        moved, _ = await load(cluster, path, "a:0-2,b:2-5")
        layer = span_bytes(path, 2, 5) - span_bytes(path, 3, 5)
        assert [figures["fetched_bytes"] for figures in moved] == [0, layer]


async def test_a_device_that_has_the_tensors_gives_them_as_well(
    tmp_path: Path, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sources at once: the coordinator, and a, which ran these layers before. The coordinator
    takes its time, or it might have given all of so small a model before b is connected to a."""
    read = Shares.read

    def slowly(shares: Shares, digest: str, offset: int, length: int) -> bytes | None:
        time.sleep(0.01)
        return read(shares, digest, offset, length)

    monkeypatch.setattr(Shares, "read", slowly)
    path = shared_models / "TinyStories-656K-q8_0.gguf"
    layers = read_card(path).n_layers
    async with devices(tmp_path, 2) as local:
        async with connected(local) as cluster:
            await load(cluster, path, f"a:0-{layers}")
            only, _ = await load(cluster, path, f"b:0-{layers}")
        fetched = {name: count for name, count in only[0].items() if name.startswith("from:")}
        assert sum(fetched.values()) == span_bytes(path, 0, layers)
        assert set(fetched) <= {"from:a", "from:coordinator"}
        assert fetched.get("from:a", 0) > 0


async def test_a_flipped_byte_on_disk_is_found_before_anything_loads_it(
    tmp_path: Path, shared_models: Path
) -> None:
    path = shared_models / STORIES
    async with devices(tmp_path, 2) as local, connected(local) as cluster:
        _, text = await load(cluster, path, "a:0-3,b:3-5")
        (shard,) = (tmp_path / "b" / "cache" / "shards").glob("*.gguf")
        data = bytearray(shard.read_bytes())
        data[-1000] ^= 0x40
        shard.write_bytes(data)
        mended, same = await load(cluster, path, "a:0-3,b:3-5")
        assert same == text
        assert mended[0]["fetched_bytes"] == 0
        assert 0 < mended[1]["fetched_bytes"] <= 512 << 10


async def test_a_source_that_gives_wrong_bytes_is_refused_in_words(
    tmp_path: Path, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shared_models / STORIES
    async with devices(tmp_path, 2) as local, connected(local) as cluster:
        read = type(cluster._coordinator.shares).read

        def lie(shares: object, digest: str, offset: int, length: int) -> bytes | None:
            data = read(shares, digest, offset, length)  # type: ignore[arg-type]
            known = any(digest in s.manifests for s in cluster._coordinator.shares._shares.values())
            return data if known or not data else data[:-1] + bytes([data[-1] ^ 1])

        monkeypatch.setattr(type(cluster._coordinator.shares), "read", lie)
        with pytest.raises(FetchError, match="wrong bytes") as caught:
            await load(cluster, path, "a:0-3,b:3-5")
        assert caught.value.device in ("a", "b")
        assert not list(tmp_path.rglob("shards/*.gguf"))  # noqa: ASYNC240 - quick
        monkeypatch.undo()
        monkeypatch.setattr(Session, "local", property(lambda session: False))
        await load(cluster, path, "a:0-3,b:3-5")


async def test_a_device_killed_in_mid_transfer_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinymodels, "FEED_FORWARD", 1 << 14)  # 4 MiB a tensor, 60 MiB in all
    path = tinymodels.write_tiny_model("llama", tmp_path)
    total = span_bytes(path, 2, 5)
    read, served = Shares.read, 0

    def slowly(shares: Shares, digest: str, offset: int, length: int) -> bytes | None:
        nonlocal served
        time.sleep(0.01)
        data = read(shares, digest, offset, length)
        served += len(data or b"")
        return data

    monkeypatch.setattr(Shares, "read", slowly)
    async with devices(tmp_path, 2) as local, connected(local) as cluster:
        task = asyncio.create_task(load(cluster, path, "a:0-2,b:2-5"))
        await until(lambda: served > total // 2 or task.done())
        local.nodes[1].process.kill()
        with pytest.raises(PeerLostError):
            await task
    assert not list((tmp_path / "b").rglob("shards/*"))
    async with devices(tmp_path, 2) as local, connected(local) as cluster:
        (_, second), text = await load(cluster, path, "a:0-2,b:2-5")
        assert second["resumed_bytes"] > 0
        assert second["resumed_bytes"] + second["fetched_bytes"] == total
        assert text
    # a had its part, or resumed it: what came twice is little
    whole = total + span_bytes(path, 0, 2)
    manifests = 1 << 20
    assert served <= whole + (4 << 20) + manifests
