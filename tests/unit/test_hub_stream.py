"""Models of the hub without a copy: header by a range, digests as the file passes, then ranges."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest

from edgellm.errors import DeviceError, EdgeError, HubError, ModelFileError, UsageError
from edgellm.modelfile import open_model, read_card
from edgellm.settings import HubSettings
from edgellm.store import hublibrary, hubstream
from edgellm.store.digests import TensorDigests
from edgellm.store.hubname import HubName
from edgellm.store.hubplace import HubPlace, Span
from edgellm.store.hubranges import WINDOW_BYTES, HubPieces
from edgellm.store.hubstream import TensorHashes, forget, known, stream
from tests.fakehub import FakeHub, fake_hub
from tests.tinymodels import write_tiny_model
from tests.tinyonnx import write_tiny_onnx
from tests.unit.test_gguf_split import split

pytest.importorskip("huggingface_hub")

REPO = "someone/tiny-GGUF"
NAME = HubName(REPO)
FILE = "tiny-Q4_K_M.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hublibrary, "RETRY_AFTER_S", 0.01)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def server(path: Path) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.add(REPO, {FILE: path.read_bytes()})
        yield made


@pytest.fixture
def settings(server: FakeHub, tmp_path: Path) -> HubSettings:
    return HubSettings(tmp_path / "cache", server.hub)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "known"


def test_it_is_the_model_without_its_bytes(
    path: Path, settings: HubSettings, folder: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    found = stream(NAME, settings, folder, lambda *each: told.append(each))
    whole = open_model(path)
    assert found.model.digest == whole.digest
    assert read_card(found.model).layers == read_card(whole).layers
    assert dict(found.digests) == TensorDigests(tmp_path / "d").of(whole, whole.tensors)
    assert told[-1] == ("verify", whole.file_bytes, whole.file_bytes)
    with pytest.raises(UsageError):  # never zeros in its bytes' place
        found.model.read(next(iter(found.model.tensors)))
    assert not settings.cache.exists()
    here = sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file())
    assert here < whole.file_bytes / 4


def test_a_model_passes_by_once(server: FakeHub, settings: HubSettings, folder: Path) -> None:
    first = stream(NAME, settings, folder)
    server.requests.clear()
    offline = HubSettings(settings.cache, settings.endpoint, offline=True)
    again = stream(NAME, offline, folder)
    assert not server.requests
    assert (again.model.digest, again.digests) == (first.model.digest, first.digests)
    assert known(folder) == {f"hf.co/{REPO}": first.model.file_bytes}
    for damaged in folder.glob("*.head"):
        damaged.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="not known here, and HF_HUB_OFFLINE is set"):
        stream(NAME, offline, folder)
    assert stream(NAME, settings, folder).model.digest == first.model.digest  # learnt again
    assert forget(folder, NAME)
    assert not known(folder)
    assert not forget(folder, NAME)


def test_split_files(
    server: FakeHub, settings: HubSettings, folder: Path, path: Path, tmp_path: Path
) -> None:
    parts = split(path, tmp_path)
    server.repos[REPO] = {f"x/{part.name}": part.read_bytes() for part in parts}
    found = stream(NAME, settings, folder)
    whole = open_model(parts[0])
    assert found.model.digest == whole.digest
    pieces = HubPieces(found.place, settings)
    for name, tensor in found.digests.items():
        assert pieces.read(tensor.digest, 0, tensor.nbytes) == whole.read(name)


def test_a_header_that_is_longer_than_expected(
    settings: HubSettings, folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubstream, "FIRST_HEADER_BYTES", 40)
    assert stream(NAME, settings, folder).model.digest == open_model(path).digest


def test_a_stream_that_breaks_goes_on(
    server: FakeHub, settings: HubSettings, folder: Path, path: Path, tmp_path: Path
) -> None:
    size = path.stat().st_size
    server.cuts = [size, size // 3, size // 4]  # the header's, then twice in the stream
    found = stream(NAME, settings, folder)
    whole = open_model(path)
    assert dict(found.digests) == TensorDigests(tmp_path / "d").of(whole, whole.tensors)


def test_bytes_that_are_not_the_repositorys(
    server: FakeHub, settings: HubSettings, folder: Path, path: Path
) -> None:
    data = path.read_bytes()
    server.spoil = {FILE: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]}
    with pytest.raises(HubError, match="other bytes"):
        stream(NAME, settings, folder)
    assert not known(folder)


def test_what_cannot_be_streamed(
    server: FakeHub, settings: HubSettings, folder: Path, tmp_path: Path
) -> None:
    graph = write_tiny_onnx("onnx-grouped", tmp_path / "made")
    server.add_folder("someone/onnx", graph.parent)
    with pytest.raises(UsageError, match="ONNX"):
        stream(HubName("someone/onnx"), settings, folder)
    server.add(REPO, {FILE: b"GGUF" + bytes(10_000)})
    with pytest.raises(ModelFileError):
        stream(NAME, settings, folder)
    server.ranges = False
    with pytest.raises(HubError, match=r"no parts of files.*edgellm pull hf\.co/someone"):
        stream(NAME, settings, folder)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(DeviceError, match="given up"):
        stream(NAME, settings, folder, cancel=cancel)
    assert not known(folder)


@pytest.mark.pure
@pytest.mark.parametrize("seed", range(8))
def test_hashes_do_not_depend_on_how_the_bytes_come(seed: int) -> None:
    random_ = random.Random(seed)
    sizes = [random_.choice((1, 7, 524_287, 524_288, 524_289, 1_200_000)) for _ in range(4)]
    gaps = [random_.randrange(0, 100) for _ in range(5)]
    tensors, at = [], gaps[0]
    for number, size in enumerate(sizes):
        tensors.append((f"t{number}", at, size))
        at += size + gaps[number + 1]
    data = random_.randbytes(at)

    def hashed(step: int) -> dict[str, bytes]:
        sink = TensorHashes(len(data), random_.sample(tensors, len(tensors)))
        for begin in range(0, len(data), step):
            sink.append(data[begin : begin + step])
        return {name: bytes(value) for name, value in sink.hashes.items()}

    wanted = hashed(len(data))
    assert {name: len(value) // 32 for name, value in wanted.items()} == {
        name: -(-size // 524_288) for name, _, size in tensors
    }
    assert hashed(random_.randrange(1000, 300_000)) == wanted
    data = bytes(len(data))
    assert hashed(len(data)) != wanted


def test_tensors_that_lie_over_one_another() -> None:
    with pytest.raises(ModelFileError, match="over one another"):
        TensorHashes(100, [("a", 0, 60), ("b", 50, 10)])


# --- ranges ---------------------------------------------------------------------------


def test_only_the_ranges_of_what_is_asked(
    server: FakeHub, settings: HubSettings, folder: Path, path: Path
) -> None:
    found = stream(NAME, settings, folder)
    name, tensor = max(found.digests.items(), key=lambda each: each[1].nbytes)
    pieces = HubPieces(found.place.only({tensor.digest}), settings)
    assert pieces.held([tensor.digest, DIGEST]) == {tensor.digest}
    server.requests.clear()
    whole = open_model(path).read(name)
    assert pieces.read(tensor.digest, 10, 100) == whole[10:110]
    assert pieces.read(tensor.digest, 50, 100) == whole[50:150]  # it is here now
    (asked,) = [each.range for each in server.requests if each.server == "storage"]
    offset = found.model.tensors[name].info.offset
    end = offset + min(WINDOW_BYTES, tensor.nbytes) - 1
    assert asked == f"bytes={offset}-{end}"
    assert pieces.read(tensor.digest, tensor.nbytes - 5, 6) is None
    assert pieces.read(DIGEST, 0, 1) is None


def test_a_signed_place_that_has_run_out(
    server: FakeHub, settings: HubSettings, folder: Path
) -> None:
    """The storage's address is used again, without a token, until it refuses."""
    server.token = "hf_secret"
    settings = HubSettings(settings.cache, settings.endpoint, token="hf_secret")
    found = stream(NAME, settings, folder)
    digests = [each.digest for each in found.digests.values()]
    pieces = HubPieces(found.place, settings)
    server.requests.clear()
    for digest in digests[:3]:
        assert pieces.read(digest, 0, 1) is not None
    assert [each.server for each in server.requests] == ["hub", "storage", "storage", "storage"]
    server.refuse = 1
    assert pieces.read(digests[3], 0, 1) is not None
    assert [each.server for each in server.requests[4:]] == ["storage", "hub", "storage"]
    assert {each.token for each in server.requests if each.server == "storage"} == {""}


def test_a_device_that_may_use_no_network(settings: HubSettings) -> None:
    place = HubPlace(REPO, COMMIT, (FILE,), MappingProxyType({}))
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        HubPieces(place, HubSettings(settings.cache, settings.endpoint, offline=True))


@pytest.mark.pure
def test_a_place_comes_back_as_it_was() -> None:
    place = HubPlace(REPO, COMMIT, (FILE, "x/y.gguf"), {DIGEST: Span(1, 5, 9)})
    assert HubPlace.decode(place.encode()) == place
    assert place.only(()).tensors == {}


@pytest.mark.pure
@pytest.mark.parametrize(
    "change",
    [
        {"repo": "../../x"},
        {"repo": "a/b/../../c"},
        {"repo": "http://evil.org/a"},
        {"repo": 7},
        {"commit": "main"},
        {"commit": "../../../x"},
        {"files": []},
        {"files": ["../x.gguf"]},
        {"files": ["x.gguf"] * 2000},
        {"tensors": {DIGEST: [1, 0, 5]}},
        {"tensors": {DIGEST: [0, -1, 5]}},
        {"tensors": {DIGEST: [0, 0, 0]}},
        {"tensors": {DIGEST: [0, 0, 1 << 60]}},
        {"tensors": {DIGEST: [0, 0]}},
        {"tensors": {DIGEST: [False, 0, 5]}},
        {"tensors": {"x": [0, 0, 5]}},
        {"tensors": []},
        {"tensors": None},
    ],
)
def test_a_place_that_is_none(change: dict[str, object]) -> None:
    told = {"repo": REPO, "commit": COMMIT, "files": [FILE], "tensors": {DIGEST: [0, 0, 5]}}
    HubPlace.decode(json.dumps(told).encode())
    for raw in (json.dumps(told | change).encode(), b"[" * 100_000, b"\xff", b"[]", b""):
        with pytest.raises(EdgeError):
            HubPlace.decode(raw)
