"""Models of the Hugging Face cache and of the folder of models: used without a network, listed,
removed."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.errors import EdgeError, UsageError
from edgellm.modelref import locate, open_reference, opened_as_told
from edgellm.settings import HubSettings, hub_settings
from edgellm.store import hublibrary
from edgellm.store.hub import pull
from edgellm.store.hubcache import HubCache
from edgellm.store.hubname import HubName
from edgellm.store.library import ModelLibrary, Where
from edgellm.wire.messages import LoadProgress
from tests.fakehub import LARGE, FakeHub, fake_hub
from tests.tinymodels import write_tiny_model
from tests.tinyonnx import write_tiny_onnx

pytest.importorskip("huggingface_hub")

REPO = "someone/tiny-GGUF"
ONNX = "someone/tiny-onnx"
NAME = HubName(REPO)
SECRET = "hf_secretsecretsecret"
TOKENIZER = b"{}"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_model("llama", tmp_path_factory.mktemp("gguf")).read_bytes()


@pytest.fixture
def server(gguf: bytes) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.add(REPO, {"README.md": b"A model.", "tiny-Q4_K_M.gguf": gguf})
        yield made


@pytest.fixture
def settings(server: FakeHub, tmp_path: Path) -> HubSettings:
    return HubSettings(tmp_path / "hub", server.hub)


# --- without a network ----------------------------------------------------------------


@pytest.fixture
def at_home(
    server: FakeHub, settings: HubSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment says."""
    monkeypatch.setenv("HF_HUB_CACHE", str(settings.cache))
    monkeypatch.setenv("HF_ENDPOINT", server.hub)
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("at_home")
def test_what_is_here_is_used_without_a_network(
    server: FakeHub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_reference(f"https://huggingface.co/{REPO}:q4_k_m")
    server.requests.clear()
    short = REPO.partition("/")[2].lower()
    for name in (f"hf.co/{REPO}", f"hf.co/{REPO}:Q4_K_M", REPO, short, f"{short}:Q4_K_M"):
        assert open_reference(name).digest == first.digest
    assert not server.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate(f"hf.co/{REPO}").read_bytes() == gguf
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set, and it is not on this device"):
        open_reference("hf.co/someone/else:Q8_0")
    assert not server.requests


@pytest.mark.usefixtures("at_home")
def test_what_the_library_fetched_is_used(
    server: FakeHub, settings: HubSettings, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    graph = write_tiny_onnx("onnx-grouped", tmp_path / "made")
    server.add_folder(ONNX, graph.parent)
    server.add(ONNX, {"tokenizer.json": TOKENIZER})
    for path in server.repos[ONNX]:
        if path != "model.onnx.data":
            hf_hub_download(ONNX, path, cache_dir=settings.cache, endpoint=server.hub)
    assert HubCache(settings.cache).find(HubName(ONNX)) is None  # its weights are missing
    hf_hub_download(ONNX, "model.onnx.data", cache_dir=settings.cache, endpoint=server.hub)
    server.requests.clear()
    assert open_reference(f"hf.co/{ONNX}").engine == "onnx"
    assert not server.requests


@pytest.mark.usefixtures("at_home")
def test_a_newer_commit_comes_when_it_is_asked_for(
    server: FakeHub, settings: HubSettings, gguf: bytes
) -> None:
    pull(NAME, settings)
    newer = gguf + bytes(32)
    server.add(REPO, {"tiny-Q4_K_M.gguf": newer})
    assert locate(f"hf.co/{REPO}").read_bytes() == gguf
    pull(NAME, settings)
    assert locate(f"hf.co/{REPO}").read_bytes() == newer


@pytest.mark.usefixtures("at_home")
async def test_a_load_that_is_cancelled_ends_its_fetch_and_keeps_what_came(
    server: FakeHub, settings: HubSettings
) -> None:
    """What the Python API does for ``cluster.load("hf.co/...")``."""
    server.hurry = threading.Event()
    told: list[tuple[str, LoadProgress]] = []
    came = asyncio.Event()

    def progress(device: str, report: LoadProgress) -> None:
        told.append((device, report))
        if report.done:
            came.set()

    opening = asyncio.create_task(opened_as_told(f"hf.co/{REPO}", (), progress))
    await asyncio.wait_for(came.wait(), 30)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    server.hurry.set()
    held = sum(HubCache(settings.cache).unfinished().values())
    assert held
    assert {(device, report.part) for device, report in told} == {("hub", "fetch")}
    assert (await opened_as_told(f"hf.co/{REPO}", ())).engine == "llama"
    assert f"bytes={held}-" in [request.range for request in server.requests]


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "XDG_CACHE", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = hub_settings()
    assert found.cache == tmp_path / ".cache" / "huggingface" / "hub"
    assert (found.endpoint, found.offline, found.token) == ("https://huggingface.co", False, None)
    monkeypatch.setenv("HF_HOME", "~/hf")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hub/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    monkeypatch.setenv("HF_TOKEN", f" {SECRET}\n")
    wanted = HubSettings(tmp_path / "hf" / "hub", "https://mirror.example/hub", True, SECRET)
    assert hub_settings() == wanted
    monkeypatch.setenv("HF_ENDPOINT", "ftp://mirror.example")
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        hub_settings()


# --- list and remove ------------------------------------------------------------------


def library_of(settings: HubSettings, tmp_path: Path) -> ModelLibrary:
    return ModelLibrary(HubCache(settings.cache), tmp_path / "models")


def test_models_are_listed_and_removed_one_by_one(
    server: FakeHub, settings: HubSettings, gguf: bytes, tmp_path: Path
) -> None:
    other = gguf + bytes(32)
    server.add(REPO, {"tiny-Q8_0.gguf": other, "note.txt": b"n"})
    for quant in ("Q4_K_M", "Q8_0"):
        pull(HubName(REPO, quant), settings)
    library = library_of(settings, tmp_path)
    held = {model.name: model for model in library.all()}
    assert {name: (m.where, m.nbytes) for name, m in held.items()} == {
        f"hf.co/{REPO}:Q4_K_M": (Where.HUB, len(gguf)),
        f"hf.co/{REPO}:Q8_0": (Where.HUB, len(other)),
    }
    assert library.remove(held[f"hf.co/{REPO}:Q4_K_M"]) == len(gguf)
    assert [model.name for model in library.all()] == [f"hf.co/{REPO}:Q8_0"]
    assert held[f"hf.co/{REPO}:Q8_0"].open_path().read_bytes() == other
    assert library.remove(held[f"hf.co/{REPO}:Q8_0"]) >= len(other)
    assert not list(library.all())
    assert not HubCache(settings.cache).repo_folder(REPO).exists()


def test_removing_frees_what_is_linked_twice_and_leaves_others_files(
    server: FakeHub, settings: HubSettings, tmp_path: Path
) -> None:
    graph = write_tiny_onnx("onnx-grouped", tmp_path / "made")
    server.add_folder(ONNX, graph.parent)
    server.add(ONNX, {"tokenizer.json": TOKENIZER, "model.safetensors": b"s" * LARGE})
    pulled = pull(HubName(ONNX), settings)
    from huggingface_hub import hf_hub_download

    hf_hub_download(ONNX, "model.safetensors", cache_dir=settings.cache, endpoint=server.hub)
    library = library_of(settings, tmp_path)
    (held,) = library.all()
    weights = sum(path.stat().st_size for path in graph.parent.iterdir())
    assert library.remove(held) == weights
    left = sorted(path.name for path in pulled.model.snapshot.iterdir())
    assert left == ["model.safetensors", "tokenizer.json"]
    assert not list(library.all())


def test_unfinished_parts_can_be_removed(
    server: FakeHub, settings: HubSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hublibrary, "RETRIES", 0)
    server.cuts = [100_000]
    with pytest.raises(EdgeError):
        pull(NAME, settings)
    cache = HubCache(settings.cache)
    assert cache.drop_unfinished(REPO) == 100_000
    assert not cache.unfinished()


def test_the_folder_of_models(tmp_path: Path, settings: HubSettings, gguf: bytes) -> None:
    folder = tmp_path / "models"
    (folder / "deep").mkdir(parents=True)
    (folder / "story.gguf").write_bytes(gguf)
    (folder / "deep" / "mmproj-x.gguf").write_bytes(gguf)
    write_tiny_onnx("onnx-grouped", folder / "graph" / "onnx")
    (folder / "graph" / "tokenizer.json").write_bytes(TOKENIZER)
    library = library_of(settings, tmp_path)
    assert [model.name for model in library.all()] == ["story", "graph"]
    for name in ("story", "STORY", "story.gguf"):
        named = library.named(name)
        assert named is not None
        assert named.open_path() == folder / "story.gguf"
    graph = library.named("graph")
    assert graph is not None
    assert open_reference(str(graph.open_path())).engine == "onnx"
    size = sum(path.stat().st_size for path in (folder / "graph").rglob("*") if path.is_file())
    assert graph.nbytes == library.remove(graph) == size
    assert not (folder / "graph").exists()
    for name in ("../models/story", "/story", "nothing", ""):
        assert library.named(name) is None
