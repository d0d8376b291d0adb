"""The node: what ``edgellm join`` runs. The composition root: the one place that picks concrete
classes for a device (transport, engines, identity).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from edgellm import __version__
from edgellm.engine.host import HostFactory, ProcessStage, StageHost
from edgellm.errors import DeviceError
from edgellm.runtime.hosted import StageParts
from edgellm.runtime.session import Introduction, Session
from edgellm.runtime.worker import Worker
from edgellm.settings import NodeSettings
from edgellm.store.home import HomeLock
from edgellm.store.shards import ShardFolder
from edgellm.transport.base import Listener, Stream, Transport
from edgellm.transport.memory import MemoryNetwork
from edgellm.transport.tcp import TcpTransport
from edgellm.wire.messages import DeviceInfo

SOFTWARE = f"edgellm {__version__}"
_ID_HEX_DIGITS = 64
DIAL_WITHIN_S = 5.0


async def process_stage(name: str) -> StageHost:
    """The usual host of a stage: a process of its own."""
    return await ProcessStage.start(name)


class Node:
    """One device: listens for peers and hosts stages until closed."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        transport: Transport | None = None,
        start_host: HostFactory = process_stage,
    ) -> None:
        self.settings = settings
        self._transport = transport or TcpTransport()
        self._start_host = start_host
        self._me = Introduction(settings.name, load_device_id(settings.home), SOFTWARE)
        self._sessions: set[Session] = set()
        self._worker: Worker | None = None
        self._listener: Listener | None = None
        self._lock = HomeLock(settings.home)
        self._inside = MemoryNetwork()
        self._inside_listener: Listener | None = None

    @property
    def device_id(self) -> str:
        return self._me.device_id

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) that peers can connect to; after ``start``."""
        if self._listener is None:
            raise DeviceError("the node is not started.", device=self.settings.name)
        return self._listener.address

    async def start(self) -> None:
        """Listen. Raises PeerLostError when the address cannot be used, HomeBusyError when another
        node has our home."""
        self._lock.acquire()
        shards = ShardFolder(self.settings.home / "shards")
        shards.sweep()
        parts = StageParts(
            device=self.settings.name,
            start_host=self._start_host,
            shards=shards,
            dial=self._dial,
            threads=self.settings.threads,
            pin=self.settings.pin,
        )
        self._worker = Worker(parts, self.describe, self._allow_payloads)
        try:
            self._listener = await self._transport.listen(
                self.settings.listen, self.settings.port, self._accept
            )
            host, port = self._listener.address
            self._lock.tell(format_address(host, port))
            inside = self._inside.transport("node")
            self._inside_listener = await inside.listen(host, port, self._accept)
        except BaseException:
            await self.close()
            raise

    def direct(self) -> Transport:
        """A way to this node from inside its own process, without the kernel between."""
        return self._inside.transport("inside")

    async def close(self) -> None:
        """Stop listening, end all stages, hang up."""
        for listener in (self._listener, self._inside_listener):
            if listener is not None:
                await listener.close()
        if self._worker is not None:
            await self._worker.close()
        for session in list(self._sessions):
            await session.close()
        self._lock.release()

    def describe(self) -> DeviceInfo:
        """What this device offers now."""
        free = psutil.virtual_memory().available
        within = _cgroup_free()
        if within is not None:
            free = min(free, within)
        offered = self.settings.memory_bytes or free
        engines = ["stub"]
        if importlib.util.find_spec("llama_cpp") is not None:
            engines.append("llama")
        return DeviceInfo(
            name=self.settings.name,
            device_id=self._me.device_id,
            memory_total=offered,
            memory_free=min(offered, free),
            cores=self.settings.threads or os.cpu_count() or 1,
            software=SOFTWARE,
            engines=tuple(engines),
        )

    async def _accept(self, stream: Stream) -> None:
        if self._worker is not None:
            await Session.accept(stream, self._me, self._worker, on_open=self._register)

    async def _dial(self, host: str, port: int) -> Session:
        if self._worker is None:
            raise DeviceError("the node is not started.", device=self.settings.name)
        session = await Session.dial(
            self._transport, host, port, self._me, self._worker, within_s=DIAL_WITHIN_S
        )
        self._register(session)
        return session

    def _register(self, session: Session) -> None:
        self._sessions.add(session)
        session.on_close(lambda reason: self._sessions.discard(session))
        if self._worker is not None:
            session.allow_payloads(self._worker.payload_limits_of(session))

    def _allow_payloads(self, allow: Callable[[Session], Mapping[int, int]]) -> None:
        for session in self._sessions:
            session.allow_payloads(allow(session))


def format_address(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def load_device_id(home: Path) -> str:
    """This device's id, made on first use: 64 hex digits. Raises DeviceError for a bad home."""
    path = home / "device_id"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists():
            text = path.read_text(encoding="ascii").strip()
            if len(text) == _ID_HEX_DIGITS and set(text) <= set("0123456789abcdef"):
                return text
        made = secrets.token_hex(_ID_HEX_DIGITS // 2)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(made + "\n", encoding="ascii")
        aside.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"the home folder {home} cannot be used: {error}.",
            hint="Name another one with --home or EDGELLM_HOME.",
        ) from error
    return made


def _cgroup_free() -> int | None:
    """Bytes that the control group (a container) still allows, None where it sets no limit."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "memory.max").read_text(encoding="ascii"))
        return max(0, most - int((folder / "memory.current").read_text(encoding="ascii")))
    return None
