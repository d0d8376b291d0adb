"""Hostile names, given to every part that takes names from peers or files, under an audit hook.

``python -m tests.hostilenames TASK ROOT`` prints ``{"seen": [[EVENT, PATH], ...], ...}``: what was
opened, listed, made, moved or removed outside ROOT meanwhile. Python itself raises the events, so
there is no way around them that a test could forget to look at. For test_path_traversal.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from unittest import mock

import gguf

from edgellm.discovery.base import How, sighting_from
from edgellm.discovery.known import KnownDevices
from edgellm.engine.host import InlineStage, StageHost
from edgellm.engine.stage_main import ENGINES
from edgellm.errors import EdgeError
from edgellm.identity import TrustStore, make_identity
from edgellm.modelfile.manifest import ShardManifest
from edgellm.modelref import open_reference
from edgellm.node import Node
from edgellm.runtime.session import Introduction, Session
from edgellm.runtime.shares import share_model
from edgellm.settings import NodeSettings
from edgellm.store.cache import ShardCache
from edgellm.store.digests import TensorDigests
from edgellm.transport.memory import MemoryNetwork
from edgellm.types import EngineSettings, LayerSpan
from edgellm.wire.frames import Frame
from edgellm.wire.messages import (
    ErrorReport,
    FetchPiece,
    FileWanted,
    LoadStage,
    Message,
    PeerAddress,
    PieceData,
    StageReady,
    encode,
)
from edgellm.wire.plain import settings_to_plain
from tests import tinymodels

STEMS = (
    "../secret", "../../secret", "..", ".", "../", "./../secret", "a/../../secret", "..\\secret",
    "..\\..\\secret", "/etc/passwd", "//etc/passwd", "\\\\host\\share", "C:\\secret", "C:secret",
    "file:///etc/passwd", "~/secret", "~root/.ssh/id_rsa", "$HOME/secret", "%2e%2e%2fsecret",
    "..%2fsecret", "..%c0%afsecret", "\uff0e\uff0e/secret", "..\u2215secret", "secret\0.gguf",
    "\0", "", " ", "-rf", "--help", "|cat /etc/passwd", "$(cat secret)", "`cat secret`", ";ls",
    "/proc/self/environ", "/proc/self/fd/0", "/dev/stdin", "/dev/zero", "/dev/tty", "CON", "NUL",
    "x\n../secret", "\u202e../secret",
)  # fmt: skip
FORMS = ("{}", "{}.gguf", "shards/{}", "{}-00001-of-00002.gguf", "a" * 64 + "/{}")
NAMES = tuple(form.format(stem) for stem, form in itertools.product(STEMS, FORMS))
DIGEST = "0" * 64
ANSWER_WITHIN_S = 10.0

Told = dict[str, int]
_EVENTS = {
    "open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.truncate", "os.link", "os.symlink", "os.chmod", "os.chown", "os.utime", "shutil.rmtree",
    "shutil.copyfile", "shutil.move", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
    "ctypes.dlopen",
}  # fmt: skip


class Witness:
    """Notes what is done to files outside a folder, while it watches."""

    def __init__(self, root: Path) -> None:
        self.seen: list[tuple[str, str]] = []
        self._root = root.resolve()
        self._watching = False
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._watching or event not in _EVENTS:
            return
        what = arguments[0] if arguments else None
        if not isinstance(what, str | bytes | os.PathLike):
            return  # a descriptor that is open already
        path = os.fsdecode(what)
        # A path with a NUL opens nothing, but should not have come so far.
        inside = "\0" not in path and Path(os.path.realpath(path)).is_relative_to(self._root)
        if not inside and not _is_code(path, arguments) and not _is_limit(path):
            self.seen.append((event, path))


def _is_code(path: str, arguments: tuple[object, ...]) -> bool:
    """Whether Python reads a module: parts of ours are imported when they are needed."""
    return path.endswith((".py", ".pyc")) and arguments[1:2] in (("r",), ("rb",), (None,))


def _is_limit(path: str) -> bool:
    """Whether it says what this process may use: a node looks when it counts threads and memory."""
    return path in ("/proc/self/cgroup", "/proc/self/mounts") or (
        path.startswith("/sys/fs/cgroup/") and ".." not in path
    )


# --- what takes names -----------------------------------------------------------------


async def careless(root: Path, witness: Witness) -> Told:
    """Negative control: what must be found out."""
    with witness.watching():
        for name in NAMES:
            with contextlib.suppress(OSError, ValueError):
                (root / name).open("rb").close()
    return {}


class _Asking:
    """A coordinator that has no tensors."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Message | None] = asyncio.Queue()

    def on_frame(self, session: Session, frame: Frame) -> None:
        del session, frame

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        del frame
        if isinstance(message, FetchPiece):
            session.send(PieceData(message.request, False, b""))
        elif isinstance(message, ErrorReport | StageReady):
            self.answers.put_nowait(message)

    def on_session_closed(self, session: Session) -> None:
        del session
        self.answers.put_nowait(None)


def _load_with(epoch: int, name: str, where: str) -> LoadStage:
    model: dict[str, str] = {"engine": "llama", "name": "m", "path": "", "digest": DIGEST}
    files: tuple[FileWanted, ...] = (FileWanted("shard", DIGEST, 100),)
    sources: tuple[PeerAddress, ...] = ()
    match where:
        case "engine":
            model = dict.fromkeys(model, name)
        case "path":
            model |= {"name": name, "path": name}
        case "digest":
            model |= {"name": name, "path": name, "digest": name}
            files = ()
        case "manifest":
            files = (FileWanted("shard", name, 100),)
        case "role":
            files = (FileWanted(name, DIGEST, 100),)
        case _:
            sources = (PeerAddress("f" * 64, name, name, 1),)
    settings = settings_to_plain(EngineSettings(threads=1, context=64))
    return LoadStage(
        epoch=epoch, index=0, stage_count=1, first=0, end=1, layers=2, model=model,
        settings=settings, next_host="", next_port=0, width=8, vocab=256, deadline_s=5.0,
        next_id="", previous_id="", files=files, sources=sources,
    )  # fmt: skip


async def load_requests(root: Path, witness: Witness) -> Told:
    """Of models, paths, digests, engines, devices and manifests: from a coordinator on another
    machine to a node, over the wire, into everything that a load does."""

    async def start_host(name: str) -> StageHost:
        del name
        return InlineStage(ENGINES)

    Session.local = property(lambda session: False)  # type: ignore[method-assign,assignment]
    network = MemoryNetwork()
    node = Node(
        NodeSettings("a", root / "home"), transport=network.transport("a"), start_host=start_host
    )
    await node.start()
    told = {"never sent": 0, "refused": 0, "loaded": 0}
    epochs = itertools.count(1)
    with witness.watching():
        for where in ("engine", "path", "digest", "manifest", "role", "source"):
            for name in NAMES:
                request = _load_with(next(epochs), name, where)
                try:
                    encode(request)  # the check that the receiver does as well
                except EdgeError:
                    told["never sent"] += 1
                    continue
                asking = _Asking()
                session = await Session.dial(
                    network.transport("x"), *node.address, Introduction("x", "e" * 64, "x"), asking
                )
                session.send(request)
                answer = await asyncio.wait_for(asking.answers.get(), ANSWER_WITHIN_S)
                told["loaded" if isinstance(answer, StageReady) else "refused"] += 1
                await session.close()
    await node.close()
    return told


async def digests(root: Path, witness: Witness) -> Told:
    """Where a digest belongs."""
    cache = ShardCache(root / "cache", 1 << 30)
    cache.sweep()
    told = {"sent": 0, "given": 0}
    with witness.watching():
        for name in NAMES:
            told["given"] += cache.holds([name])[0] or cache.read(name, 0, 16) is not None
            with contextlib.suppress(EdgeError):
                encode(FetchPiece(1, name, 0, 16))
                told["sent"] += 1
    return told


async def devices(root: Path, witness: Witness) -> Told:
    """Names and ids of devices, as they are announced, introduced, remembered and read back."""
    home = root / "home"
    home.mkdir()
    store = TrustStore(home)
    store.found("a")
    other = make_identity()
    known = KnownDevices(home)
    told = {"refused": 0, "admitted": 0}
    with witness.watching():
        for name in NAMES:
            for device_id in (name, other.device_id):
                try:
                    store.add(device_id, name, other.certificate)
                    told["admitted"] += 1
                except EdgeError:
                    told["refused"] += 1
            found = sighting_from(other.device_id, name, [(name, 1), ("10.0.0.1", 1)], How.KNOWN)
            known.save([found] if found else [])
            entry = {"id": name, "name": name, "addresses": [[name, 1]]}
            content = json.dumps({"format": 1, "devices": [entry]})
            (home / "peers.json").write_text(content, encoding="utf-8")
            known.load()
        TrustStore(home).refresh()
    return told


def _named(directory: Path, name: str) -> Path:
    """A model that calls itself ``name``."""
    add = gguf.GGUFWriter.add_name
    with mock.patch.object(gguf.GGUFWriter, "add_name", lambda writer, _: add(writer, name)):
        return tinymodels.write_tiny_model("llama", directory, layers=2)


async def model_files(root: Path, witness: Witness) -> Told:
    """What a GGUF calls itself, when it is opened, shared, cut, and put into the cache."""
    told = {"cut": 0, "refused": 0}
    cache = ShardCache(root / "cache", 1 << 30)
    cache.sweep()
    for name in STEMS:  # a file each, and each is waited for until it is on the disk
        path = _named(root, name)
        with witness.watching():
            try:
                model = open_reference(str(path)).model
                if model is None:
                    continue
                share = await share_model(model, [LayerSpan(0, 1)], TensorDigests(root / "digests"))
                for wanted in share.files[0]:
                    manifest = ShardManifest.decode(share.manifests[wanted.manifest])
                    assembly = cache.assemble(manifest, models=(model,))
                    assembly.finish().release()
                    assembly.close()
                told["cut"] += 1
            except EdgeError:
                told["refused"] += 1
        path.unlink()
    return told


TASKS: dict[str, Callable[[Path, Witness], Awaitable[Told]]] = {
    "careless": careless,
    "load_requests": load_requests,
    "digests": digests,
    "devices": devices,
    "model_files": model_files,
}


async def main(task: str, root: Path) -> None:
    witness = Witness(root)
    told = await TASKS[task](root, witness)
    print(json.dumps({"seen": witness.seen, **told}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
