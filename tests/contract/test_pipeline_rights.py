"""Who may say what: a device's word counts for its own stage only, and no plan that a peer makes
up harms a node, or the plans of others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import (
    LocalProtocolError,
    ModelFileError,
    RemoteProtocolError,
    StageError,
)
from edgellm.modelfile import read_card
from edgellm.modelfile.cut import cut
from edgellm.runtime.coordinator import Coordinator
from edgellm.runtime.loading import load_request
from edgellm.runtime.pipeline import Pipeline
from edgellm.runtime.session import Introduction, Session
from edgellm.store.shards import ModelShape, open_local, stage_files
from edgellm.transport.base import Stream
from edgellm.transport.memory import MemoryNetwork
from edgellm.types import EngineSettings, LayerSpan, Plan
from edgellm.wire.frames import Frame
from edgellm.wire.messages import (
    DeviceInfo,
    ErrorReport,
    Hidden,
    LoadProgress,
    LoadStage,
    Message,
    QueryDevice,
    Result,
    StageReady,
    StageStats,
    StartEngine,
    Tokens,
    UnloadStage,
    encode,
    kind_of,
)
from edgellm.wire.plain import settings_to_plain
from tests.contract.test_pipeline import PROMPT, SPLITS, complete, greedy, loaded
from tests.contract.test_pipeline_faults import (
    COUNT,
    EXPECTED,
    Stranger,
    hidden_rows,
    inline_three,
    stranger,
    three,
)
from tests.inline import InlineCluster, inline_cluster, until
from tests.tinymodels import write_tiny_model

NO_FRAME = Frame(1, b"", memoryview(b""), b"")


def request(**changes: object) -> LoadStage:
    """A second stage of two, of the stub."""
    made = LoadStage(
        epoch=77,
        index=1,
        stage_count=2,
        first=3,
        end=6,
        layers=6,
        model={"engine": "stub"},
        settings=settings_to_plain(EngineSettings(context=64, chunk=8, threads=1)),
        next_host="",
        next_port=0,
        width=8,
        vocab=256,
        deadline_s=5.0,
        previous_id="e" * 64,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def settings_of(cluster: InlineCluster, device: str) -> EngineSettings:
    worker = cluster.nodes[device]._worker
    assert worker is not None
    return worker._stages[77]._settings


# --- what a plan may ask of a node ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"width": 1 << 20, "settings": settings_to_plain(EngineSettings(chunk=4096))},
            "over the protocol's limit",
        ),
        (
            {"settings": settings_to_plain(EngineSettings(context=1 << 24, sequences=128))},
            "KV cells",
        ),
        (
            # below the limit only until llama.cpp rounds the cells up
            {"settings": settings_to_plain(EngineSettings(context=(1 << 23) - 1, sequences=256))},
            "KV cells",
        ),
        ({"previous_id": ""}, "which device has the stage before"),
    ],
)
async def test_an_absurd_plan_is_refused_and_harms_nobody(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    async with three(tmp_path, pace_s=0.001) as (cluster, model, network):
        task = asyncio.create_task(complete(model, count=COUNT))
        await until(lambda: cluster.resident == 3)
        handler, session = await stranger(network, cluster, "b")
        session.send(request(**changes))
        await until(lambda: bool(handler.got))
        (report,) = handler.got
        assert isinstance(report, ErrorReport)
        assert (report.epoch, report.sequence) == (77, -1)
        assert report.error["code"] == "stage_failed"
        assert words in report.error["message"]
        assert not handler.closed
        assert list((await task).tokens) == EXPECTED
        # and who connects afterwards is served as before
        async with loaded(cluster, "c:0-3,b:3-6") as other:
            assert list((await complete(other, count=5)).tokens) == EXPECTED[:5]
        await session.close()


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (1, 1), (512, 1)])
async def test_threads_stay_within_the_device_s_own_limit(
    tmp_path: Path, asked: int, given: int
) -> None:
    """The nodes of these tests have one thread each."""
    async with inline_three(tmp_path) as (cluster, network):
        handler, session = await stranger(network, cluster, "b")
        settings = settings_to_plain(EngineSettings(context=64, chunk=8, threads=asked))
        session.send(request(settings=settings))
        await until(lambda: any(isinstance(each, StageReady) for each in handler.got))
        assert settings_of(cluster, "b").threads == given
        await session.close()


async def test_only_the_stage_before_may_send_large_payloads(tmp_path: Path) -> None:
    async with three(tmp_path) as (cluster, _, network):
        worker = cluster.nodes["b"]._worker
        assert worker is not None
        limits = {
            session.peer.name: worker.payload_limits_of(session).get(kind_of(Hidden), 0)
            for session in cluster.nodes["b"]._sessions
        }
        assert limits.pop("a") > 0
        assert set(limits.values()) == {0}  # the coordinator's, and c's, where it goes to
        # too large is refused by the header alone, before anything looks at the rows
        handler, session = await stranger(network, cluster, "b")
        session.send(hidden_rows(1, 1, 0))
        await until(lambda: handler.closed)


@pytest.mark.parametrize(
    "shape",
    [
        lambda s: (s.layers + 1, s.width, s.vocab),
        lambda s: (s.layers, s.width * 2, s.vocab),
        lambda s: (s.layers, s.width, s.vocab - 1),
    ],
)
def test_a_model_that_the_plan_has_wrong_is_not_used(
    tmp_path: Path, model_dir: Path, shape: Callable[[ModelShape], tuple[int, int, int]]
) -> None:
    path = write_tiny_model("llama", model_dir)
    card = read_card(path)
    right = ModelShape(card.n_layers, card.n_embd, card.n_vocab)
    wrong = ModelShape(*shape(right))
    with pytest.raises(ModelFileError, match="the plan says"):
        open_local(path, card.digest, wrong)
    assert open_local(path, card.digest, right).digest == card.digest
    with pytest.raises(ModelFileError, match="another model"):
        open_local(path, "0" * 64, right)
    span = LayerSpan(card.n_layers - 2, card.n_layers)
    shard = cut(card.model, span, tmp_path / "shard.gguf").path
    with pytest.raises(ModelFileError, match="the plan says"):
        stage_files(shard, None, digest=card.digest, span=span, shape=wrong)
    with pytest.raises(ModelFileError, match="the plan says"):
        stage_files(shard, None, digest=card.digest, span=LayerSpan(0, 2), shape=right)
    assert stage_files(shard, None, digest=card.digest, span=span, shape=right).shard == shard


# --- what a coordinator believes ------------------------------------------------------


async def test_a_coordinator_believes_a_device_about_its_own_stage_only(tmp_path: Path) -> None:
    network = MemoryNetwork()
    async with (
        inline_cluster(4, tmp_path, network=network, pace_s=0.001) as cluster,
        loaded(cluster, SPLITS[4]) as model,
    ):
        coordinator = cluster.client._coordinator
        told: list[str] = []
        coordinator._progress = lambda device, progress: told.append(device)
        epoch = model.plan.epoch
        a, _, c = model.pipeline.sessions
        d = coordinator.peers["d"].session  # not of the plan
        task = asyncio.create_task(complete(model, count=COUNT))
        await until(lambda: cluster.resident == 3)
        (running,) = model.pipeline._running.values()
        failed = StageError("nonsense.").to_dict()
        for step in range(20):
            at = len(running.generation.tokens) - 1
            lies: list[tuple[Session, Message]] = [
                (a, Tokens(epoch, (Result(running.sequence, at, 5),))),
                (d, Tokens(epoch, (Result(running.sequence, at, 5),))),
                (d, ErrorReport(epoch, running.sequence, failed)),
                (d, ErrorReport(epoch, -1, failed)),
                (a, LoadProgress(epoch, 1, "cut", 1, 2)),
                (d, LoadProgress(epoch, 0, "cut", 1, 2)),
                (c, StageStats(epoch, 0, {"tokens": step})),
                (c, StageStats(epoch, 9, {"tokens": step})),
            ]
            for session, message in lies:
                coordinator.on_message(session, message, NO_FRAME)
            await asyncio.sleep(0.001)
        assert list((await task).tokens) == EXPECTED
        asked = asyncio.create_task(model.pipeline.stats())
        await until(lambda: bool(model.pipeline._stats))
        coordinator.on_message(c, StageStats(epoch, 0, {"tokens": -5}), NO_FRAME)
        assert (await asked)[0]["tokens"] > 0
        assert told == []
        coordinator.on_message(a, LoadProgress(epoch, 0, "cut", 1, 2), NO_FRAME)
        assert told == ["a"]


async def test_a_stage_is_ready_when_its_own_device_says_so(tmp_path: Path) -> None:
    async with inline_three(tmp_path, pace_s=0.1) as (cluster, _):
        coordinator = cluster.client._coordinator
        loading = contextlib.AsyncExitStack()
        task = asyncio.create_task(loading.enter_async_context(loaded(cluster, SPLITS[1])))
        await until(lambda: len(coordinator._loading) == 2)
        (epoch, _), *_ = coordinator._loading
        c = coordinator.peers["c"].session
        for index in (0, 1):
            coordinator.on_message(c, StageReady(epoch, index, 1, {}), NO_FRAME)
        assert not any(future.done() for future in coordinator._loading.values())
        await task
        await loading.aclose()


@dataclasses.dataclass
class Liar(Stranger):
    """A device that says of itself what it is told to."""

    name: str = "x"
    device_id: str = "1" * 64
    silent: bool = False

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        super().on_message(session, message, frame)
        if isinstance(message, QueryDevice) and not self.silent:
            info = DeviceInfo(self.name, self.device_id, 1, 1, 1, "test", ())
            session.send(info)


@contextlib.asynccontextmanager
async def listening(liar: Liar):  # type: ignore[no-untyped-def]
    """(coordinator, address) where the device greets as x with the id 1..."""
    network = MemoryNetwork()

    async def accept(stream: Stream) -> None:
        await Session.accept(stream, Introduction("x", "1" * 64, "test"), liar)

    listener = await network.transport("x").listen("x", 0, accept)
    coordinator = Coordinator(
        network.transport("coordinator"), Introduction("coordinator", "0" * 64, "test")
    )
    try:
        yield coordinator, listener.address
    finally:
        await coordinator.close()
        await listener.close()


@pytest.mark.parametrize("liar", [Liar(name="y"), Liar(device_id="2" * 64)])
async def test_a_device_that_says_two_things_of_itself_is_hung_up_on(liar: Liar) -> None:
    async with listening(liar) as (coordinator, address):
        with pytest.raises(RemoteProtocolError, match="greeted as x"):
            await coordinator.devices.connect(*address)
        assert not coordinator.peers
        await until(lambda: liar.closed)


async def test_a_connect_that_is_given_up_hangs_up() -> None:
    liar = Liar(silent=True)
    async with listening(liar) as (coordinator, address):
        task = asyncio.create_task(coordinator.devices.connect(*address))
        await until(lambda: bool(liar.got))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: liar.closed)
        assert not coordinator.peers
        assert not coordinator.questions._waiting


async def test_an_honest_device_is_connected_and_forgotten_by_its_session() -> None:
    liar = Liar()
    async with listening(liar) as (coordinator, address):
        peer = await coordinator.devices.connect(*address)
        assert dict(coordinator.peers) == {"x": peer}
        assert await coordinator.devices.connect(*address) is peer  # again: the same device
        coordinator.devices.by_name = {"another-name": peer}
        await peer.session.close()
        assert not coordinator.peers


# --- nothing is lost, nothing stays ---------------------------------------------------


async def test_sending_after_the_end_of_the_same_read_is_silent() -> None:
    """A message and the end in one read: its handler may answer without being failed for it."""
    network = MemoryNetwork()
    answered: list[Message] = []

    class Answering(Stranger):
        def on_message(self, session: Session, message: Message, frame: Frame) -> None:
            session.send(QueryDevice())
            session.send_raw(frame)
            answered.append(message)

    async def accept(stream: Stream) -> None:
        await Session.accept(stream, Introduction("x", "1" * 64, "test"), Answering())

    listener = await network.transport("x").listen("x", 0, accept)
    handler = Stranger()
    me = Introduction("y", "2" * 64, "test")
    session = await Session.dial(network.transport("y"), *listener.address, me, handler)
    session._stream.write([*encode(UnloadStage(1)), *encode(StartEngine({}))])
    await until(lambda: handler.closed)
    assert answered == [UnloadStage(1)]
    await listener.close()


async def test_a_token_in_the_journal_is_shown_though_the_next_step_cannot_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with three(tmp_path) as (_, model, _):
        shown: list[int] = []
        pieces = model.answer(PROMPT, greedy(COUNT)).pieces()
        send_step = Pipeline.send_step

        def fails(*_: object) -> None:
            raise LocalProtocolError("the connection is closed, not open.")

        with pytest.raises(LocalProtocolError):
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if piece.made is not None:
                        shown.append(piece.made.token)
                    (running,) = model.lasting._running.values()
                    if len(shown) == 3:
                        journal = running.generation
                        monkeypatch.setattr(Pipeline, "send_step", fails)
        assert shown == EXPECTED[: len(shown)]
        assert tuple(shown) == journal.made
        monkeypatch.setattr(Pipeline, "send_step", send_step)
        assert list((await complete(model, count=5)).tokens) == EXPECTED[:5]


async def test_a_load_that_cannot_be_sent_unloads_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with inline_three(tmp_path) as (cluster, _):
        make = load_request

        def fails(plan: Plan, *arguments: Any) -> LoadStage:
            if arguments[2] == 2:  # the index of a stage
                raise LocalProtocolError("it does not fit a frame.")
            return make(plan, *arguments)

        monkeypatch.setattr("edgellm.runtime.coordinator.load_request", fails)
        with pytest.raises(LocalProtocolError):
            async with loaded(cluster, SPLITS[4]):
                pytest.fail("it must not load")
        coordinator = cluster.client._coordinator
        assert not coordinator._pipelines
        assert not coordinator._loading
        await asyncio.sleep(0.05)  # what was sent has arrived
        assert cluster.hosted == 0


@pytest.mark.parametrize("device", ["a", "b", "c"])
async def test_a_plan_that_failed_is_unloaded_everywhere_at_once(
    tmp_path: Path, device: str
) -> None:
    """While its model is still in use: nobody needs to leave it first."""
    async with three(tmp_path) as (cluster, model, _):
        cluster.stages[device][0].crash("was killed (SIGKILL)")
        await until(lambda: cluster.hosted == 0 and all(s.ended for s in cluster.all_stages))
        with pytest.raises(StageError, match="was killed"):
            await complete(model)


async def test_a_node_drops_a_stage_whose_process_is_gone_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its coordinator makes of it."""
    async with three(tmp_path) as (cluster, _, _network):
        monkeypatch.setattr(Coordinator, "_on_error", lambda *_: None)
        cluster.stages["a"][0].crash("was killed (SIGKILL)")
        worker = cluster.nodes["a"]._worker
        assert worker is not None
        await until(lambda: not worker._stages)
        await until(lambda: cluster.stages["a"][0].ended)
