"""A model of the hub that no device keeps a copy of: each fetches its own ranges, and nothing that
was not verified is loaded. Real node processes; the hub is on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.client import LoadOptions
from edgellm.errors import FetchError
from edgellm.modelref import open_reference
from edgellm.store.hubcache import HubCache
from tests.cluster.conftest import StartCluster
from tests.cluster.test_fetch import OPTIONS, PROMPT, span_bytes
from tests.cluster.test_recovery import answer, at, greedy, kill, same
from tests.fakehub import FakeHub, fake_hub

pytest.importorskip("huggingface_hub")

REPO = "someone/story-GGUF"
FILE = "story-Q8_0.gguf"
SPLIT = "a:0-3,b:3-"


@pytest.fixture
def hub(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.add(REPO, {FILE: demo_model.read_bytes()})
        monkeypatch.setenv("HF_ENDPOINT", made.hub)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield made


async def test_each_device_fetches_its_own_ranges(
    hub: FakeHub, demo_model: Path, tmp_path: Path, start_cluster: StartCluster
) -> None:
    options = LoadOptions(stages=SPLIT, exact=True, context=256)
    opened = open_reference(f"hf.co/{REPO}", copy=False)
    assert not HubCache(tmp_path / "cache").repos()  # no copy
    hub.requests.clear()
    async with (
        start_cluster(2) as (cluster, _),
        cluster.load(str(demo_model), options) as model,
    ):
        wanted = await model.complete(PROMPT, OPTIONS)
    async with start_cluster(2) as (cluster, _):
        async with cluster.load(opened, options) as model:
            made = await model.complete(PROMPT, OPTIONS)
            assert made.tokens == wanted.tokens
            layers = model.plan.layers
            for figures, span in zip(model.pipeline.loads, ((0, 3), (3, layers)), strict=True):
                assert figures["fetched_bytes"] == span_bytes(demo_model, *span)
                # what both need (a head that is the embedding) may come from the other one
                others = sum(figures.get(f"from:{name}", 0.0) for name in "ab")
                assert figures["from:hub"] + others == figures["fetched_bytes"]
                assert figures["from:hub"] > others
            fetched = sum(figures["from:hub"] for figures in model.pipeline.loads)
        asked = [each.range for each in hub.requests if each.server == "storage"]
        size = sum(int(b) - int(a) + 1 for a, b in (r[6:].split("-") for r in asked))
        assert size == fetched  # their ranges and no more
        # again: the devices have their layers, and the hub is asked for nothing
        hub.requests.clear()
        async with cluster.load(open_reference(f"hf.co/{REPO}", copy=False), options) as model:
            assert (await model.complete(PROMPT, OPTIONS)).tokens == wanted.tokens
            assert [figures["fetched_bytes"] for figures in model.pipeline.loads] == [0, 0]
        # a device that needs more has it from the other one
        whole = dataclasses.replace(options, stages="b:0-")
        async with cluster.load(opened, whole) as model:
            assert (await model.complete(PROMPT, OPTIONS)).tokens == wanted.tokens
            (figures,) = model.pipeline.loads
            assert figures["from:a"] == figures["fetched_bytes"] > 0
        assert not hub.requests


async def test_a_device_is_lost_and_its_layers_come_from_the_hub(
    hub: FakeHub, demo_model: Path, start_cluster: StartCluster
) -> None:
    options = LoadOptions(stages=SPLIT, exact=True, context=256)
    opened = open_reference(f"hf.co/{REPO}", copy=False)
    async with start_cluster(3) as (cluster, nodes):
        async with cluster.load(opened, options) as model:
            wanted = await answer(model, PROMPT, greedy())
        async with cluster.load(opened, options) as model:
            hub.requests.clear()
            made = await answer(model, PROMPT, greedy(), at(20, lambda: kill(nodes, "b")))
            same(made, wanted)
            assert "b" not in [stage.device for stage in made.plan.stages]
            assert hub.requests  # nobody else had them


async def test_ranges_with_other_bytes_are_never_loaded(
    hub: FakeHub, demo_model: Path, start_cluster: StartCluster
) -> None:
    opened = open_reference(f"hf.co/{REPO}", copy=False)
    data = bytearray(hub.repos[REPO][FILE])
    for wrong in range(len(data) // 2, len(data), 4096):
        data[wrong] ^= 1
    hub.spoil = {FILE: bytes(data)}
    async with start_cluster(2) as (cluster, _):
        with pytest.raises(FetchError, match="hub sent other bytes than it should"):
            async with cluster.load(opened, LoadOptions(stages=SPLIT, exact=True, context=256)):
                pytest.fail("it was loaded")
