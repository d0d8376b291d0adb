"""Pairing over streams, the node's desk, and a command's conversation with it: in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgellm.errors import PairingError, PeerLostError, RemoteProtocolError
from edgellm.identity import TrustStore
from edgellm.identity.invitation import Reason
from edgellm.identity.refusals import RefusedError
from edgellm.runtime import pairing
from edgellm.runtime.desk import PairingDesk
from edgellm.runtime.ownnode import own_node
from edgellm.runtime.pairing import join_at, tries_left
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.base import Stream, Transport
from edgellm.transport.memory import MemoryNetwork
from edgellm.wire.frames import Frame
from edgellm.wire.messages import Message
from edgellm.wire.trust import Forget, InvitationNews, OpenInvitation
from tests.pairs import device

HERE = ("inviter", 7171)
ELSEWHERE = ("elsewhere", 7171)


@dataclass
class Inviting:
    """A device that pairs others over a network in memory."""

    trust: TrustStore
    desk: PairingDesk
    transport: Transport
    notices: list[str]
    inviting: list[bool]
    leaves: list[None]
    news: list[InvitationNews] = field(default_factory=list)

    def open(self, within_s: float = 60.0) -> str:
        return self.desk.open(within_s, on_news=self.news.append).code


Start = Callable[..., Awaitable[Inviting]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    network = MemoryNetwork()
    async with contextlib.AsyncExitStack() as stack:

        async def made(name: str = "kitchen", at: tuple[str, int] = HERE) -> Inviting:
            trust = device(tmp_path / name)
            notices: list[str] = []
            inviting: list[bool] = []
            leaves: list[None] = []
            desk = PairingDesk(
                trust,
                name,
                on_inviting=inviting.append,
                on_notice=notices.append,
                on_leave=lambda: leaves.append(None),
            )
            stack.callback(desk.close)
            listener = await network.transport(name).listen(*at, desk.on_stream)
            stack.push_async_callback(listener.close)
            ways = network.transport("attic")
            return Inviting(trust, desk, ways, notices, inviting, leaves)

        yield made


def wrong(code: str) -> str:
    return f"{(int(code) + 1) % 10**8:08d}"


async def settle(condition: Callable[[], object]) -> None:
    """Both ends of a stream do not end in the same turn of the loop."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - of several kinds
            await asyncio.sleep(0.005)


async def test_two_devices_are_paired(start: Start, tmp_path: Path) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    code = kitchen.open()
    paired = await join_at([HERE], code, attic, "attic", transport=kitchen.transport)
    assert paired.inviter.device_id == kitchen.trust.identity.device_id
    assert (paired.inviter.name, paired.address) == ("kitchen", HERE)
    assert [member.name for member in paired.others] == ["kitchen"]
    assert attic.cluster_id == kitchen.trust.cluster_id
    assert attic.trusted(kitchen.trust.identity.device_id)
    assert kitchen.trust.trusted(attic.identity.device_id)
    await settle(lambda: kitchen.news)
    joined = InvitationNews(0, True, attic.identity.device_id, "attic", "")
    assert kitchen.news == [joined]
    assert kitchen.inviting == [True, False]
    assert "Device attic belongs to the cluster now." in kitchen.notices


async def test_an_invitation_is_for_one_device(start: Start, tmp_path: Path) -> None:
    kitchen = await start()
    code = kitchen.open()
    await join_at([HERE], code, device(tmp_path / "b"), "b", transport=kitchen.transport)
    await settle(lambda: kitchen.news)
    with pytest.raises(RefusedError) as refused:
        await join_at([HERE], code, device(tmp_path / "c"), "c", transport=kitchen.transport)
    assert refused.value.reason is Reason.NO_INVITATION
    assert "edgellm invite" in str(refused.value)


async def test_three_wrong_codes_close_the_window(start: Start, tmp_path: Path) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    code = kitchen.open()
    left = []
    for _ in range(3):
        with pytest.raises(RefusedError) as refused:
            await join_at([HERE], wrong(code), attic, "attic", transport=kitchen.transport)
        assert refused.value.reason is Reason.WRONG_CODE
        left.append(tries_left(refused.value))
    assert left == [2, 1, 0]
    await settle(lambda: len(kitchen.news) == 3)
    assert [news.over for news in kitchen.news] == [False, False, True]
    assert all("wrong code" in news.problem for news in kitchen.news)
    assert kitchen.inviting == [True, False]
    with pytest.raises(RefusedError) as late:
        await join_at([HERE], code, attic, "attic", transport=kitchen.transport)
    assert late.value.reason is Reason.NO_INVITATION
    assert not attic.cluster_id
    assert not kitchen.trust.trusted(attic.identity.device_id)


async def test_without_an_invitation_nobody_joins_and_people_hear_of_it_once(
    start: Start, tmp_path: Path
) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    for _ in range(5):
        with pytest.raises(RefusedError, match="no invitation open"):
            await join_at([HERE], "12345678", attic, "attic", transport=kitchen.transport)
    await settle(lambda: kitchen.notices)
    assert len(kitchen.notices) == 1


async def test_an_invitation_ends_in_time(start: Start) -> None:
    kitchen = await start()
    kitchen.open(0.05)
    await settle(lambda: kitchen.news)
    assert kitchen.news[0].over
    assert "nobody has joined" in kitchen.news[0].problem
    assert kitchen.inviting == [True, False]


async def test_a_new_invitation_ends_the_old_one(start: Start, tmp_path: Path) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    first = kitchen.open()
    second = kitchen.open()
    assert first != second
    assert kitchen.news[0].over
    assert kitchen.inviting == [True, False, True]
    with pytest.raises(RefusedError):
        await join_at([HERE], first, attic, "attic", transport=kitchen.transport)
    await join_at([HERE], second, attic, "attic", transport=kitchen.transport)


async def test_the_right_device_is_found_among_addresses(start: Start, tmp_path: Path) -> None:
    """Nobody at the first address, another device that invites at the second."""
    kitchen, pantry = await start(), await start("pantry", ELSEWHERE)
    code = kitchen.open()
    pantry.open()
    attic = device(tmp_path / "attic")
    paired = await join_at(
        [("nobody", 1), ELSEWHERE, HERE],
        code,
        attic,
        "attic",
        inviter_id=kitchen.trust.identity.device_id,
        transport=kitchen.transport,
    )
    assert paired.address == HERE
    assert not pantry.news, "another device's invitation lost no try"


async def test_nobody_there(start: Start, tmp_path: Path) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    with pytest.raises(PeerLostError):
        await join_at([("nobody", 1)], "12345678", attic, "attic", transport=kitchen.transport)
    with pytest.raises(PeerLostError):
        await join_at([], "12345678", attic, "attic", transport=kitchen.transport)


async def test_a_device_of_another_cluster_is_refused(start: Start, tmp_path: Path) -> None:
    kitchen, pantry = await start(), await start("pantry", ELSEWHERE)
    attic = device(tmp_path / "attic")
    await join_at([HERE], kitchen.open(), attic, "attic", transport=kitchen.transport)
    before = attic.cluster_id
    code = pantry.open()
    with pytest.raises(RefusedError) as refused:
        await join_at([ELSEWHERE], code, attic, "attic", transport=kitchen.transport)
    assert refused.value.reason is Reason.OTHER_CLUSTER
    assert "forget" in str(refused.value)
    assert attic.cluster_id == before
    assert not pantry.trust.trusted(attic.identity.device_id)


async def test_a_forgotten_device_comes_back_by_a_code(start: Start, tmp_path: Path) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    await join_at([HERE], kitchen.open(), attic, "attic", transport=kitchen.transport)
    kitchen.trust.forget(attic.identity.device_id)
    await join_at([HERE], kitchen.open(), attic, "attic", transport=kitchen.transport)
    assert kitchen.trust.trusted(attic.identity.device_id)


async def test_a_busy_inviter_is_asked_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kitchen, attic = await start(), device(tmp_path / "attic")
    monkeypatch.setattr(pairing, "BUSY_WAIT_S", 0.01)
    asked = []

    async def busy_at_first(*arguments: object) -> object:
        asked.append(arguments)
        if len(asked) == 1:
            raise RefusedError(Reason.BUSY, 0, "busy.", None)
        return await once(*arguments)  # type: ignore[arg-type]

    once = pairing._join_once
    monkeypatch.setattr(pairing, "_join_once", busy_at_first)
    await join_at([HERE], kitchen.open(), attic, "attic", transport=kitchen.transport)
    assert len(asked) == 2


@pytest.mark.parametrize("sends", [b"", b"EGP1", b"EGP1\x01\xff\xff\xff\xff", b"GET / HTTP/1.1"])
async def test_who_does_not_pair_is_let_go(sends: bytes, start: Start) -> None:
    """A stream that stays silent, or talks of something else, is served to its end, and costs no
    try."""
    kitchen = await start()
    kitchen.open()
    stream = await kitchen.transport.dial(*HERE, 1.0)
    stream.write([sends])
    stream.close()
    await settle(lambda: kitchen.notices)
    assert not kitchen.news
    assert kitchen.inviting == [True]


async def test_a_silent_joiner_is_refused_at_its_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.identity.pairing.ATTEMPT_S", 0.05)
    kitchen = await start()
    kitchen.open()
    stream = await kitchen.transport.dial(*HERE, 1.0)
    async with asyncio.timeout(5):
        said = bytearray()
        while chunk := await stream.read(100):
            said += chunk
            stream.close()
    await settle(lambda: any("too long" in each for each in kitchen.notices))


async def test_an_inviter_that_vanishes_is_told_of(tmp_path: Path) -> None:
    network = MemoryNetwork()

    async def hang_up(stream: Stream) -> None:
        await stream.read(10)

    listener = await network.transport("kitchen").listen(*HERE, hang_up)
    attic = device(tmp_path / "attic")
    with pytest.raises(PairingError, match="ended the connection"):
        await join_at([HERE], "12345678", attic, "attic", transport=network.transport("attic"))
    assert not attic.cluster_id
    await listener.close()


# --- the owner's requests -------------------------------------------------------------


class _Worker:
    """What a node does with messages, here: the desk's alone."""

    def __init__(self, desk: PairingDesk) -> None:
        self._desk = desk
        self.refused: list[RemoteProtocolError] = []

    def on_frame(self, session: Session, frame: Frame) -> None:
        raise RemoteProtocolError("no rows here.")

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        try:
            assert self._desk.take(session, message)
        except RemoteProtocolError as error:
            self.refused.append(error)
            raise

    def on_session_closed(self, session: Session) -> None: ...


@dataclass
class Owned:
    """A device with a desk, and a way to it that proves nobody: as from its own commands."""

    device: Inviting
    worker: _Worker
    transport: Transport
    at: tuple[str, int]

    def introduction(self, device_id: str = "") -> Introduction:
        return Introduction("desk", device_id or self.device.trust.identity.device_id, "test")


@pytest.fixture
async def owned(start: Start) -> AsyncIterator[Owned]:
    kitchen = await start()
    network = MemoryNetwork()
    worker = _Worker(kitchen.desk)
    me = Introduction("kitchen", kitchen.trust.identity.device_id, "test", boot=1)

    async def serve(stream: Stream) -> None:
        await Session.accept(stream, me, worker)

    listener = await network.transport("kitchen").listen("kitchen", 1, serve)
    yield Owned(kitchen, worker, network.transport("command"), listener.address)
    await listener.close()


async def test_a_command_opens_an_invitation_and_hears_who_joined(
    owned: Owned, tmp_path: Path
) -> None:
    attic = device(tmp_path / "attic")
    async with own_node(owned.transport, owned.at, owned.introduction()) as node:
        assert node.name == "kitchen"
        opened = await node.invite(60.0)
        assert 59 < opened.expires_s <= 60
        way = owned.device.transport
        with pytest.raises(RefusedError):
            await join_at([HERE], wrong(opened.code), attic, "attic", transport=way)
        first = await node.news()
        assert not first.over
        assert "2 tries" in first.problem
        await join_at([HERE], opened.code, attic, "attic", transport=way)
        last = await node.news()
        assert (last.over, last.name) == (True, "attic")
        assert last.device_id == attic.identity.device_id


async def test_a_command_withdraws_its_invitation(owned: Owned, tmp_path: Path) -> None:
    attic = device(tmp_path / "attic")
    async with own_node(owned.transport, owned.at, owned.introduction()) as node:
        opened = await node.invite(60.0)
        await node.withdraw()
        assert (await node.news()).over
    with pytest.raises(RefusedError):
        await join_at([HERE], opened.code, attic, "attic", transport=owned.device.transport)


async def test_an_invitation_outlives_the_command_that_opened_it(
    owned: Owned, tmp_path: Path
) -> None:
    attic = device(tmp_path / "attic")
    async with own_node(owned.transport, owned.at, owned.introduction()) as node:
        opened = await node.invite(60.0)
    await join_at([HERE], opened.code, attic, "attic", transport=owned.device.transport)
    assert attic.trusted(owned.device.trust.identity.device_id)


async def test_a_command_puts_a_device_out(owned: Owned, tmp_path: Path) -> None:
    attic = device(tmp_path / "attic")
    code = owned.device.open()
    await join_at([HERE], code, attic, "attic", transport=owned.device.transport)
    async with own_node(owned.transport, owned.at, owned.introduction()) as node:
        await node.forget(attic.identity.device_id)
        with pytest.raises(PairingError, match="does not belong"):
            await node.forget("ab" * 32)
        with pytest.raises(PairingError, match="cannot forget itself"):
            await node.forget(owned.device.trust.identity.device_id)
    assert not owned.device.trust.trusted(attic.identity.device_id)


async def test_a_node_that_is_told_to_leave_is_waited_for(owned: Owned) -> None:
    async with own_node(owned.transport, owned.at, owned.introduction()) as node:
        leaving = asyncio.create_task(node.leave(5.0))
        await settle(lambda: owned.device.leaves)
        assert not leaving.done()
        await node.close()  # as the node would
        await leaving
        with pytest.raises(PeerLostError):
            await node.invite(60.0)


@pytest.mark.parametrize("message", [OpenInvitation(1, 60.0), Forget(1, "ab" * 32)])
async def test_another_device_may_not_ask_for_what_is_the_owners(
    message: OpenInvitation | Forget, owned: Owned
) -> None:
    """A member of the cluster is trusted to compute, not to let others in by our door."""
    stranger = Introduction("attic", "cd" * 32, "test", boot=1)
    ended = asyncio.Event()

    class Handler(_Worker):
        def on_session_closed(self, session: Session) -> None:
            ended.set()

    session = await Session.dial(owned.transport, *owned.at, stranger, Handler(owned.device.desk))
    session.send(message)
    async with asyncio.timeout(5):
        await ended.wait()
    assert owned.worker.refused
    assert not owned.device.inviting
