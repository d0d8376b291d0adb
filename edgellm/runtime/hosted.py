"""One stage that this node hosts: its process, its files, and where its answers go.

The node reads no activations: hidden rows pass from the stage's pipe to the next peer's
connection as the frames they came in, and back the same way on arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.engine.base import StageConfig
from edgellm.engine.host import HostFactory, StageHost
from edgellm.engine.server import stage_config_to
from edgellm.errors import (
    DeadlineError,
    EdgeError,
    PeerLostError,
    RemoteProtocolError,
    StageError,
    error_from_dict,
)
from edgellm.runtime.exchange import TensorExchange
from edgellm.runtime.session import Session
from edgellm.runtime.stagefiles import StageFilesMaker
from edgellm.store.cache import ShardCache
from edgellm.store.shards import ShardFiles
from edgellm.types import LayerSpan, Mode, Weights
from edgellm.wire.frames import MAX_PAYLOAD_BYTES, Frame
from edgellm.wire.messages import (
    CloseSequence,
    ErrorReport,
    Hidden,
    LoadProgress,
    LoadStage,
    OpenSequence,
    PeerAddress,
    StageReady,
    StageStats,
    StartEngine,
    Tokens,
    decode,
    encode,
    kind_of,
    payload_limits,
)
from edgellm.wire.plain import settings_from_plain

HIDDEN_KIND = kind_of(Hidden)
TOKENS_KIND = kind_of(Tokens)
MIN_UNSENT_BYTES = 4 << 20
CELL_STEP = 256
"""llama.cpp rounds the KV cells of a sequence up to a multiple of this."""
MAX_CELLS = (1 << 31) - 1
"""It counts the cells of all sequences in 32 bits, with a sign in places."""


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a hosted stage needs from its node."""

    device: str
    start_host: HostFactory
    device_id: str
    cache: ShardCache
    exchange: TensorExchange
    dial: Callable[[PeerAddress], Awaitable[Session]]
    """Connects to the next stage's node, and to those that hold tensors."""
    threads: int = 0
    """This device's own limit; 0: what the plan says."""
    pin: tuple[int, ...] = ()
    plain_weights: Callable[[], bool] = lambda: False
    """Whether this device computes faster with ``Weights.PLAIN``."""


class HostedStage:
    """From ``LoadStage`` to ``UnloadStage``; ends itself when its process or a link ends."""

    def __init__(
        self,
        request: LoadStage,
        coordinator: Session,
        parts: StageParts,
        on_broken: Callable[[HostedStage], None],
    ) -> None:
        """``on_broken`` is called when a loaded stage is of no use any more, after it has said
        so to the coordinator: its process or its link to the next stage is gone."""
        self.epoch = request.epoch
        self.coordinator = coordinator
        self._request = request
        self._parts = parts
        self._on_broken = on_broken
        self._upstream: Session | None = None
        self._host: StageHost | None = None
        self._files: StageFilesMaker | None = None
        self._next: Session | None = None
        self._ready: asyncio.Future[StageReady] = asyncio.get_running_loop().create_future()
        self._loading: asyncio.Task[None] | None = None
        self._congested: asyncio.Task[None] | None = None
        self._deadlines: dict[int, float] = {}
        self._closed = False
        self._memory_bytes = 0
        self._since = asyncio.get_running_loop().time()
        settings = settings_from_plain(request.settings)
        most = parts.threads or os.cpu_count() or 1
        threads = min(settings.threads or most, most)
        if settings.weights is Weights.AUTO:
            # In reference mode the bits are those of llama.cpp as it comes.
            plain = settings.mode is Mode.NORMAL and parts.plain_weights()
            weights = Weights.PLAIN if plain else Weights.REPACKED
            settings = dataclasses.replace(settings, weights=weights)
        settings = dataclasses.replace(settings, threads=threads, pin=parts.pin)
        self.payload_limits = payload_limits(
            chunk=settings.chunk, width=request.width, activations=settings.activations
        )
        """What this plan allows the stage before to send, bytes by kind."""
        chunk_bytes = self.payload_limits[HIDDEN_KIND]
        window = (request.stage_count + 2) * settings.sequences
        self._settings = settings
        self._most_unsent = max(MIN_UNSENT_BYTES, window * chunk_bytes)

    @property
    def label(self) -> str:
        request = self._request
        return f"stage {request.index + 1} of {request.stage_count}"

    @property
    def first(self) -> bool:
        """Whether it takes token ids from the coordinator, rather than a neighbour's rows."""
        return self._request.index == 0

    def describe(self, now: float) -> dict[str, Any]:
        """What it is, for people who ask (``edgellm ps``)."""
        request = self._request
        return {
            "model": str(request.model.get("name", ""))[:200],
            "layers": [request.first, request.end],
            "stage": request.index,
            "stages": request.stage_count,
            "memory_bytes": self._memory_bytes,
            "coordinator": self.coordinator.peer.name,
            "since_s": round(now - self._since, 1),
            "ready": self._memory_bytes > 0,
        }

    def takes_rows_from(self, session: Session) -> bool:
        """Whether this peer may send it rows, and open and close sequences: the coordinator at
        the first stage, at a later one the node of the stage before."""
        if self.first:
            return session is self.coordinator
        if session is self._upstream:
            return True
        if session is self.coordinator or session.peer.device_id != self._request.previous_id:
            return False
        self._upstream = session
        return True

    def refusal(self) -> EdgeError | None:
        """Why a plan with such numbers can not be loaded here, or anywhere; None if it can."""
        request, settings = self._request, self._settings
        cells = -(-settings.context // CELL_STEP) * CELL_STEP * settings.sequences
        problem = ""
        if not self.first and not request.previous_id:
            problem = "the plan does not say which device has the stage before"
        elif self.payload_limits[HIDDEN_KIND] > MAX_PAYLOAD_BYTES:
            problem = (
                f"chunks of {settings.chunk} rows of {request.width} values are over the"
                f" protocol's limit of {MAX_PAYLOAD_BYTES} bytes"
            )
        elif cells > MAX_CELLS:
            problem = (
                f"{settings.sequences} sequences of {settings.context} tokens are more than"
                f" {MAX_CELLS} KV cells"
            )
        return StageError(f"{problem}.", device=self._parts.device) if problem else None

    async def load(self) -> None:
        """Start, fetch, link, load; answers ``StageReady`` to the coordinator.

        Raises EdgeError; the caller closes this stage and reports.
        """
        self._loading = asyncio.current_task()
        request = self._request
        started = time.perf_counter()
        try:
            async with asyncio.timeout(request.deadline_s):
                # The process imports its libraries while the files are looked at, or fetched.
                self._host = await self._parts.start_host(self.label)
                self._host.receive_with(self._on_frame, self._on_end)
                config = await self._config()
                self._tell("load", 0, 0)
                if request.next_port:
                    self._next = await self._parts.dial(
                        PeerAddress(request.next_id, "", request.next_host, request.next_port)
                    )
                    self._next.on_close(self._next_lost)
                start = StartEngine(stage_config_to(config, request.epoch, request.index))
                self._host.send(encode(start))
                ready = await self._ready
        except TimeoutError as error:
            raise DeadlineError(
                f"{self.label} was not loaded within {request.deadline_s:.0f} s.",
                device=self._parts.device,
            ) from error
        self._memory_bytes = ready.memory_bytes
        figures = {**ready.figures, "total_s": time.perf_counter() - started}
        if self._files is not None:
            figures |= self._files.figures.to_plain()
        self.coordinator.send(StageReady(request.epoch, request.index, ready.memory_bytes, figures))

    def _tell(self, part: str, done: int, total: int) -> None:
        """Tell the coordinator how far the load is."""
        request = self._request
        if not self._closed:
            self.coordinator.send(LoadProgress(request.epoch, request.index, part, done, total))

    async def _config(self) -> StageConfig:
        request = self._request
        span = LayerSpan(request.first, request.end)
        engine = str(request.model.get("engine", "llama"))
        files = ShardFiles(Path(str(request.model.get("path", ""))))
        if engine == "llama":
            parts = self._parts
            self._files = StageFilesMaker(
                request,
                self.coordinator,
                own_id=parts.device_id,
                cache=parts.cache,
                exchange=parts.exchange,
                dial=parts.dial,
                tell=self._tell,
            )
            files = await self._files.make()
        return StageConfig(
            engine=engine,
            span=span,
            layers=request.layers,
            width=request.width,
            vocab=request.vocab,
            settings=self._settings,
            shard=str(files.shard),
            embedding=str(files.embedding or ""),
            residual=files.residual,
            input_node=files.input_node,
            embedding_scale=files.embedding_scale,
        )

    # --- towards the stage ------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """Pass a step, hidden rows or a query to the stage.

        Never waits: a connection that stops reading for one slow stage could not answer a
        heartbeat. Back-pressure is the coordinator's window of chunks in flight; whoever sends
        much more than that breaks the protocol (RemoteProtocolError).
        """
        if self._host is None or self._closed:
            return
        if self._host.unsent > self._most_unsent:
            raise RemoteProtocolError(
                f"{self._host.unsent} bytes wait for {self.label}: the sender ignores its window."
            )
        self._host.send([frame.raw])

    def open_sequence(self, message: OpenSequence, frame: Frame, now: float) -> None:
        """Announce a sequence here and, in the same order as its rows, to the stages after."""
        self._deadlines[message.sequence] = now + message.deadline_s
        self.take(frame)
        self._forward(frame)

    def close_sequence(self, message: CloseSequence, frame: Frame) -> None:
        self._deadlines.pop(message.sequence, None)
        self.take(frame)
        self._forward(frame)

    def expire(self, now: float) -> None:
        """Close the sequences whose deadline has passed: nobody waits for them any more."""
        for sequence in [s for s, deadline in self._deadlines.items() if deadline < now]:
            self._deadlines.pop(sequence)
            if self._host is not None and not self._closed:
                self._host.send(encode(CloseSequence(self.epoch, sequence)))
            error = DeadlineError("the request's deadline passed.", device=self._parts.device)
            self._report(error, sequence)

    # --- from the stage ---------------------------------------------------------------

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == HIDDEN_KIND:
            self._forward(frame)
        elif frame.kind == TOKENS_KIND:
            self.coordinator.send_raw(frame)
        else:
            self._on_control(frame)

    def _forward(self, frame: Frame) -> None:
        if self._next is None:
            return
        self._next.send_raw(frame)
        if self._next.congested and self._congested is None and self._host is not None:
            self._host.pause()
            self._congested = asyncio.create_task(self._wait_for_next(self._next, self._host))

    async def _wait_for_next(self, following: Session, host: StageHost) -> None:
        """The next device is behind: our stage waits for it, and with it those before."""
        with contextlib.suppress(PeerLostError):  # on_close tells of a lost peer, once
            await following.drain()
        self._congested = None
        host.resume()

    def _on_control(self, frame: Frame) -> None:
        try:
            answer = decode(frame)
        except EdgeError as broken:
            self._report(broken)
            return
        if isinstance(answer, StageReady):
            if not self._ready.done():
                self._ready.set_result(answer)
        elif isinstance(answer, ErrorReport):
            error = error_from_dict(answer.error)
            error.device = self._parts.device
            if not self._ready.done():
                self._ready.set_exception(error)
                return
            self._deadlines.pop(answer.sequence, None)
            self._report(error, answer.sequence)
        elif isinstance(answer, StageStats):
            stats = dict(answer.stats)
            if self._next is not None:
                link = self._next.traffic
                stats |= {"next_bytes": link.sent_bytes, "next_messages": link.sent_messages}
            self.coordinator.send(StageStats(answer.epoch, answer.index, stats))

    def _on_end(self, reason: str) -> None:
        error = StageError(f"{self.label} {reason}.", device=self._parts.device)
        if not self._ready.done():
            self._ready.set_exception(error)
        elif not self._closed:
            self._report(error)
            self._on_broken(self)

    def _next_lost(self, reason: str) -> None:
        if self._closed or self._next is None:
            return
        # Most likely that device is gone, and this report overtakes the coordinator's own notice.
        self._report(
            PeerLostError(
                f"{self._parts.device} lost the connection to it ({reason}).",
                device=self._next.peer.name,
            )
        )
        self._on_broken(self)

    def _report(self, error: EdgeError, sequence: int = -1) -> None:
        self.coordinator.send(ErrorReport(self.epoch, sequence, error.to_dict()))

    async def close(self) -> None:
        """End the process and remove the files; harmless when repeated."""
        self._closed = True
        if self._loading is not None and self._loading is not asyncio.current_task():
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._congested is not None:
            self._congested.cancel()
        if self._next is not None:
            await self._next.close()
        if self._host is not None:
            await self._host.stop()
        if not self._ready.cancel() and not self._ready.cancelled():
            self._ready.exception()  # whoever waited has gone
        if self._files is not None:
            await self._files.close()
