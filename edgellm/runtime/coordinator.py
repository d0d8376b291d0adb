"""The coordinator: connections to the devices, and loading a plan over them.

One per client. It executes plans, it does not make them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgellm.errors import (
    DeadlineError,
    EdgeError,
    PeerLostError,
    RemoteProtocolError,
    UsageError,
    error_from_dict,
)
from edgellm.runtime.pipeline import Pipeline
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.base import Transport
from edgellm.types import Epoch, Plan
from edgellm.wire.frames import Frame
from edgellm.wire.messages import (
    NO_SEQUENCE,
    DeviceInfo,
    ErrorReport,
    LoadProgress,
    LoadStage,
    Message,
    QueryDevice,
    StageReady,
    StageStats,
    Tokens,
    kind_of,
)
from edgellm.wire.plain import settings_to_plain
from edgellm.wire.tensors import LOGIT_BYTES

QUERY_WITHIN_S = 10.0
LOAD_WITHIN_S = 600.0
Progress = Callable[[str, LoadProgress], None]
"""Told (device name, how far its part of the load is)."""


def new_epoch() -> Epoch:
    """A number that no other plan of any coordinator has, below 2**53."""
    return Epoch(secrets.randbits(52) + 1)


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected device."""

    info: DeviceInfo
    host: str
    port: int
    session: Session


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, for every device of a plan."""

    engine: str
    path: str
    digest: str
    width: int
    vocab: int


class Coordinator:
    """Connects to devices and loads plans; a ``SessionHandler`` for its connections."""

    def __init__(self, transport: Transport, me: Introduction) -> None:
        self._transport = transport
        self._me = me
        self._peers: dict[str, Peer] = {}
        self._pipelines: dict[int, Pipeline] = {}
        self._loading: dict[tuple[int, int], asyncio.Future[StageReady]] = {}
        self._infos: dict[Session, asyncio.Future[DeviceInfo]] = {}
        self._progress: Progress = lambda device, progress: None

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Connected devices by name."""
        return self._peers

    async def connect(self, host: str, port: int, *, via: Transport | None = None) -> Peer:
        """Connect to the device that others reach at ``host:port`` and ask what it is.

        ``via`` is a shorter way for us alone: to the node in our own process. Raises PeerLostError,
        RemoteProtocolError for a device that says two things of itself, UsageError for a name
        that another device has.
        """
        session = await Session.dial(via or self._transport, host, port, self._me, self)
        try:
            peer = self._admit(Peer(await self._ask(session), host, port, session))
        except BaseException:
            await session.close()
            raise
        if peer.session is not session:
            await session.close()
        return peer

    async def _ask(self, session: Session) -> DeviceInfo:
        waiting: asyncio.Future[DeviceInfo] = asyncio.get_running_loop().create_future()
        self._infos[session] = waiting
        try:
            session.send(QueryDevice())
            async with asyncio.timeout(QUERY_WITHIN_S):
                info = await waiting
        except TimeoutError as error:
            raise PeerLostError(f"{session.address} did not say what it is in time.") from error
        finally:
            del self._infos[session]
        greeted = session.peer
        if (info.name, info.device_id) != (greeted.name, greeted.device_id):
            raise RemoteProtocolError(
                f"{session.address} greeted as {greeted.name} and then says it is {info.name},"
                " or gives another device id."
            )
        if session.ended:  # between its answer and now
            raise PeerLostError(f"{session.address} hung up.")
        return info

    def _admit(self, peer: Peer) -> Peer:
        """``peer``, or the same device as it is connected already."""
        known = self._peers.setdefault(peer.info.name, peer)
        if known.info.device_id != peer.info.device_id:
            raise UsageError(
                f"two devices are named {known.info.name} ({known.host}:{known.port} and"
                f" {peer.host}:{peer.port}).",
                hint="Give one of them another --name.",
            )
        return known

    async def load(
        self, plan: Plan, source: ModelSource, progress: Progress | None = None
    ) -> Pipeline:
        """Have every device of the plan load its stage; all of them, or none stays loaded.

        Raises the first stage's error, or DeadlineError.
        """
        self._progress = progress or self._progress
        peers = [self._peer(stage.device) for stage in plan.stages]
        pipeline = Pipeline(plan, [peer.session for peer in peers], source.vocab)
        loop = asyncio.get_running_loop()
        waiting = [loop.create_future() for _ in peers]
        try:
            self._pipelines[plan.epoch] = pipeline
            logits_bytes = plan.settings.sequences * source.vocab * LOGIT_BYTES
            pipeline.last.allow_payloads({kind_of(Tokens): logits_bytes})
            for index, peer in enumerate(peers):
                self._loading[plan.epoch, index] = waiting[index]
                peer.session.send(self._request(plan, source, peers, index))
            async with asyncio.timeout(LOAD_WITHIN_S):
                await asyncio.gather(*waiting)
        except TimeoutError as error:
            self.unload(pipeline)
            raise DeadlineError("the stages were not loaded in time.") from error
        except BaseException:
            self.unload(pipeline)
            raise
        finally:
            for index in range(len(peers)):
                self._loading.pop((plan.epoch, index), None)
            for future in waiting:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # one error is raised, the others are its echo
        return pipeline

    def _peer(self, device: str) -> Peer:
        peer = self._peers.get(device)
        if peer is None:
            raise PeerLostError("it is not connected any more.", device=device)
        return peer

    def _request(
        self, plan: Plan, source: ModelSource, peers: Sequence[Peer], index: int
    ) -> LoadStage:
        span = plan.stages[index].span
        after = peers[index + 1] if index + 1 < len(peers) else None
        settings = dataclasses.replace(
            plan.settings, threads=plan.settings.threads or peers[index].info.cores
        )
        return LoadStage(
            epoch=plan.epoch,
            index=index,
            stage_count=len(peers),
            first=span.first,
            end=span.end,
            layers=plan.layers,
            model={"engine": source.engine, "path": source.path, "digest": source.digest},
            settings=settings_to_plain(settings),
            next_host=after.host if after else "",
            next_port=after.port if after else 0,
            width=source.width,
            vocab=source.vocab,
            deadline_s=LOAD_WITHIN_S,
            previous_id=peers[index - 1].info.device_id if index else "",
        )

    def unload(self, pipeline: Pipeline) -> None:
        """Free a plan's stages everywhere."""
        self._pipelines.pop(pipeline.plan.epoch, None)
        pipeline.unload()

    async def close(self) -> None:
        """Unload everything and hang up."""
        for pipeline in list(self._pipelines.values()):
            self.unload(pipeline)
        for peer in list(self._peers.values()):
            await peer.session.close()

    # --- SessionHandler ---------------------------------------------------------------

    def on_frame(self, session: Session, frame: Frame) -> None:
        """Nobody sends activations to a coordinator; they are stale or a mistake."""

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        """What a device says of a stage counts only if the plan gave it that stage."""
        if isinstance(message, Tokens):
            pipeline = self._pipelines.get(message.epoch)
            if pipeline is not None and session is pipeline.last:
                pipeline.on_tokens(message, frame)
        elif isinstance(message, DeviceInfo):
            waiting = self._infos.get(session)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, StageReady):
            future = self._loading.get((message.epoch, message.index))
            if self._named(session, message) and future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, LoadProgress):
            if self._named(session, message):
                self._progress(session.peer.name, message)
        elif isinstance(message, StageStats):
            if pipeline := self._named(session, message):
                pipeline.on_stats(message)
        elif isinstance(message, ErrorReport):
            self._on_error(session, message)

    def _named(
        self, session: Session, message: StageReady | LoadProgress | StageStats
    ) -> Pipeline | None:
        """The plan of a message, if it came from the device of the stage that it names."""
        pipeline = self._pipelines.get(message.epoch)
        if pipeline is None or message.index >= len(pipeline.sessions):
            return None
        return pipeline if pipeline.sessions[message.index] is session else None

    def _on_error(self, session: Session, message: ErrorReport) -> None:
        error = error_from_dict(message.error)
        error.device = error.device or session.peer.name
        pipeline = self._pipelines.get(message.epoch)
        if pipeline is None or session not in pipeline.sessions:
            return
        if message.sequence >= 0:
            pipeline.on_error(message.sequence, error)
        else:
            self._fail(pipeline, error)

    def _fail(self, pipeline: Pipeline, error: EdgeError) -> None:
        """A plan without one of its stages is of no use: every device frees its own at once."""
        pipeline.on_error(NO_SEQUENCE, error)
        for (epoch, _), future in self._loading.items():
            if epoch == pipeline.plan.epoch and not future.done():
                future.set_exception(error)
        self.unload(pipeline)

    def on_session_closed(self, session: Session) -> None:
        """Every plan that needs this device has failed."""
        for waiting in [f for s, f in self._infos.items() if s is session and not f.done()]:
            waiting.set_exception(PeerLostError(f"{session.address} hung up."))
        # By its session: what it called itself is only its word.
        name = next((n for n, peer in self._peers.items() if peer.session is session), None)
        if name is None:
            return
        del self._peers[name]
        error = PeerLostError(
            f"the connection to it was lost ({session.reason}).",
            device=name,
            hint="Look whether it still runs, then try again.",
        )
        for pipeline in list(self._pipelines.values()):
            if session in pipeline.sessions:
                self._fail(pipeline, error)
