"""llama.cpp with its RPC backend, built once from the source that the installed engine came from.

The engine's own package has no RPC backend, and llama.cpp's releases are of other versions: a
comparison is of two ways to split a model only if the kernels are the same. Downloads through pip,
builds with CMake, and keeps the programs (some 20 MB) in the user's cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.bench.cachefolder import bench_cache
from edgellm.errors import DeviceError, UsageError
from edgellm.localcluster import our_processors

PACKAGE = "llama-cpp-python"
SOURCE = "vendor/llama.cpp"
"""Where the package's source archive holds llama.cpp's."""
SERVER = "ggml-rpc-server"
SERVING = "llama-server"
TARGETS = (SERVER, "llama")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",  # the programs are moved
    "BUILD_SHARED_LIBS": "ON",
    "GGML_RPC": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
"""But for RPC, what the engine's own build uses."""
NEEDED = (("cmake", ("cmake",)), ("a C++ compiler", ("c++", "g++", "clang++")))
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
DOWNLOAD = "--no-deps --no-binary :all: --progress-bar off"
STILL_EVERY_S = 20.0
MAX_LINE_BYTES = 1 << 20
"""Of a tool's output; compilers quote what they were called with."""
_PERCENT = re.compile(rb"^\[\s*(\d+)%\]")
_LAST_LINES = 40
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RpcBuild:
    """A folder with the server and the libraries of a client."""

    folder: Path

    @property
    def server(self) -> Path:
        return self.folder / SERVER

    @property
    def serving(self) -> Path:
        """llama.cpp's own HTTP server, where it was built."""
        return self.folder / SERVING

    @property
    def environment(self) -> dict[str, str]:
        """Makes the bindings of a child process load these libraries."""
        return {"LLAMA_CPP_LIB_PATH": str(self.folder)}

    @property
    def complete(self) -> bool:
        libraries = [*self.folder.glob("libggml-rpc.*"), *self.folder.glob("libllama.*")]
        return self.server.is_file() and len(libraries) > 1


def given_build(folder: Path, *, serving: bool = False) -> RpcBuild:
    """A build that somebody has made. Raises UsageError for a folder that holds none; where it must
    be ``serving``, also for one without llama.cpp's own HTTP server."""
    for place in (folder, folder / "bin"):
        build = RpcBuild(place.resolve())
        if build.complete and serving and not build.serving.is_file():
            raise UsageError(f"{place} holds no {SERVING}.", hint="Build that target as well.")
        if build.complete:
            return build
    raise UsageError(
        f"{folder} holds no llama.cpp with RPC: no {SERVER} beside shared libraries.",
        hint="Build llama.cpp with -DGGML_RPC=ON -DBUILD_SHARED_LIBS=ON, or leave the folder out.",
    )


async def kept_build(tell: Tell, *, serving: bool = False) -> RpcBuild:
    """The build of the installed engine's version, made if it is not there yet (minutes);
    ``serving`` with llama.cpp's own HTTP server, which is a build of its own.

    Raises UsageError where a tool is missing, DeviceError where a step fails.
    """
    version, flags = _engine_version(), os.environ.get("CMAKE_ARGS", "")
    marked = f"-{hashlib.sha256(flags.encode()).hexdigest()[:8]}" if flags else ""
    name = f"rpc-{version}{marked}"
    plain, more = (RpcBuild(bench_cache() / each) for each in (name, f"{name}-serving"))
    if more.complete and more.serving.is_file():
        return more
    if plain.complete and not serving:
        return plain
    kept = more if serving else plain
    missing = [name for name, commands in NEEDED if not any(map(_tool, commands))]
    if missing:
        raise UsageError(
            f"building llama.cpp's RPC server needs {' and '.join(missing)}.",
            hint="For example: pip install cmake; sudo apt-get install build-essential.",
        )
    what = "RPC server and its HTTP server" if serving else "RPC server"
    tell(f"Building llama.cpp's {what}, of version {PACKAGE} {version}: minutes, once.")
    kept.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rpc-", dir=kept.folder.parent) as work:
        made = await _build(Path(work), version, shlex.split(flags), tell, serving=serving)
        shutil.rmtree(kept.folder, ignore_errors=True)  # an incomplete one
        made.folder.rename(kept.folder)
    tell(f"Kept in {kept.folder}.")
    return kept


def _engine_version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            f"{PACKAGE} is not installed.", hint="Install it: pip install 'edgellm[llama]'."
        ) from error


def _tool(name: str) -> str | None:
    """The path of a tool, also where pip has put it beside this Python."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return shutil.which(name, path=places)


async def _build(
    work: Path, version: str, flags: Sequence[str], tell: Tell, *, serving: bool
) -> RpcBuild:
    await _run(
        [*PIP, "download", *DOWNLOAD.split(), "-d", str(work), f"{PACKAGE}=={version}"],
        Watch("downloading the source (about 75 MB)", tell),
    )
    source = await asyncio.to_thread(_unpack, work)
    cmake, folder = _tool("cmake") or "cmake", work / "build"
    chosen = OPTIONS | ({"LLAMA_BUILD_SERVER": "ON"} if serving else {})
    targets = (*TARGETS, SERVING) if serving else TARGETS
    options = [f"-D{name}={value}" for name, value in chosen.items()]
    await _run(
        [cmake, "-S", str(source), "-B", str(folder), *options, *flags], Watch("configuring", tell)
    )
    jobs = str(len(our_processors()))
    await _run(
        [cmake, "--build", str(folder), "--parallel", jobs, "--target", *targets],
        Watch("compiling", tell),
    )
    made = RpcBuild(folder / "bin")
    if not made.complete:
        raise DeviceError(f"the build of {PACKAGE} {version} left no {SERVER} and libraries.")
    return made


def _unpack(work: Path) -> Path:
    """llama.cpp's own part of the archive, unpacked; its folder. Raises DeviceError."""
    archives = list(work.glob("*.tar.gz"))
    if len(archives) != 1:
        raise DeviceError(f"pip left {len(archives)} source archives of {PACKAGE}, not one.")
    with tarfile.open(archives[0]) as archive:
        inner = [name for name in archive if f"/{SOURCE}/" in name.name]
        archive.extractall(work, members=inner, filter="data")
    folders = list(work.glob(f"*/{SOURCE}"))
    if len(folders) != 1:
        raise DeviceError(f"the source of {PACKAGE} has no {SOURCE}.")
    return folders[0]


class Watch:
    """Says how far a step is: every tenth of it that a tool reports, or that it still goes on."""

    def __init__(self, step: str, tell: Tell) -> None:
        self._step = step
        self._tell = tell
        self._tenths = 0
        self.lines: deque[bytes] = deque(maxlen=_LAST_LINES)

    def begin(self) -> None:
        self._tell(f"  {self._step} ...")

    def line(self, line: bytes) -> None:
        self.lines.append(line.rstrip())
        match = _PERCENT.match(line)
        if match and int(match[1]) // 10 > self._tenths:
            self._tenths = int(match[1]) // 10
            self._tell(f"  {self._step}: {self._tenths * 10} %")

    def still(self, seconds: float) -> None:
        self._tell(f"  {self._step}: {seconds:.0f} s")

    def reason(self) -> str:
        """What went wrong, from the tool's last lines."""
        texts = [line.decode("utf-8", "replace").strip() for line in self.lines]
        telling = [text for text in texts if "error" in text.lower()] or texts
        return next((text for text in telling[:1] if text), "it says nothing")


async def _run(command: Sequence[str], watch: Watch) -> None:
    """Run a tool to its end; it and what it started end with us. Raises DeviceError."""
    watch.begin()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=MAX_LINE_BYTES,
    )
    try:
        await _read(process, watch)
        status = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if status != 0:
        name = Path(command[0]).name
        raise DeviceError(f"{name} failed with status {status}: {watch.reason()}.")


async def _read(process: asyncio.subprocess.Process, watch: Watch) -> None:
    output = process.stdout
    if output is None:
        return
    began = time.monotonic()
    pending = asyncio.ensure_future(output.readline())
    told = began
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=STILL_EVERY_S)
            if done:
                line = pending.result()
                if not line:
                    return
                watch.line(line)
                pending = asyncio.ensure_future(output.readline())
            if time.monotonic() - told >= STILL_EVERY_S:
                told = time.monotonic()
                watch.still(told - began)
    finally:
        pending.cancel()
