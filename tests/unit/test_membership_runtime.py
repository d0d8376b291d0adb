"""Membership over sessions and neighbours in memory: what is decided is done, on real connections.

Its times are a tenth of the usual ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from edgellm.cluster import Member, MemberState, Policy
from edgellm.discovery.base import How, Sighting
from edgellm.errors import PeerLostError
from edgellm.runtime.membership import MAX_SHOWN, Membership
from edgellm.runtime.neighbours import Event, Lost, Neighbours
from edgellm.runtime.questions import Questions
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.base import Listener, Stream
from edgellm.transport.memory import MemoryNetwork
from edgellm.wire.connection import Timeouts
from edgellm.wire.frames import Frame, FrameDecoder
from edgellm.wire.messages import DeviceInfo, KnownPeers, Message, QueryPeers, decode, encode
from edgellm.wire.trust import Goodbye, PeerProbed, QueryMembers

POLICY = Policy(
    tick_s=0.05,
    suspect_after_s=0.2,
    dead_after_s=0.5,
    background_dead_after_s=1.5,
    max_lag_s=0.5,
    probe_every_s=0.2,
)
TIMEOUTS = Timeouts(ping_after_s=0.05, dead_after_s=0.5)
ALIVE, SUSPECTED, GONE, LEFT = MemberState


def id_of(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


class Device:
    """The parts of a node that find others and keep an eye on them."""

    def __init__(self, network: MemoryNetwork, name: str, boot: int, device: str = "") -> None:
        self.me = Introduction(name, id_of(device or name), "test", boot)
        self.host = f"10.0.0.{ord(name[0]) % 100}"
        self.transport = network.transport(name)
        self.events: list[Event] = []
        self.notices: list[str] = []
        self.history: list[tuple[str, MemberState]] = []
        self.neighbours = Neighbours(
            self.me.device_id,
            name,
            self._dial,
            own=lambda: [self.listener.address],
            interfaces=lambda: (),
            on_event=self.events.append,
            on_failed=self._failed,
            chance=lambda: 0.5,
        )
        self.membership = Membership(
            self.me,
            self.neighbours,
            policy=POLICY,
            on_change=self._changed,
            on_notice=self.notices.append,
        )
        self.questions = Questions()
        self.listener: Listener

    async def start(self, port: int = 0) -> None:
        self.listener = await self.transport.listen(self.host, port, self._accept)
        await self.neighbours.start()

    def sees(self, other: Device) -> None:
        here = (other.listener.address,)
        self.neighbours.saw(Sighting(other.me.device_id, other.me.name, here, How.MDNS))

    def state(self, name: str) -> MemberState | None:
        return self.membership.state_of(id_of(name))

    def facts(self, name: str) -> dict[str, object]:
        return next(each for each in self.membership.seen() if each["device_id"] == id_of(name))

    async def close(self, *, politely: bool = True) -> None:
        if politely:
            self.membership.goodbye("it was stopped")
        self.membership.close()
        await self.neighbours.close()
        await self.listener.close()

    def _changed(self, member: Member, before: MemberState | None) -> None:
        self.history.append((member.name, member.state))

    def _failed(self, device_id: str, problem: str) -> None:
        self.membership.failed(device_id, problem)

    async def _dial(self, host: str, port: int) -> Session:
        session = await Session.dial(
            self.transport, host, port, self.me, self, timeouts=TIMEOUTS, within_s=0.5
        )
        self.membership.opened(session)
        return session

    async def _accept(self, stream: Stream) -> None:
        opened = self.membership.opened
        await Session.accept(stream, self.me, self, timeouts=TIMEOUTS, on_open=opened)

    def on_frame(self, session: Session, frame: Frame) -> None: ...

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        if isinstance(message, QueryPeers):
            session.send(KnownPeers(self.neighbours.known()))
        elif isinstance(message, KnownPeers):
            self.neighbours.on_known_peers(session, message)
        elif not self.membership.take(session, message):
            assert self.questions.take(session, message), message

    def on_session_closed(self, session: Session) -> None:
        self.questions.closed(session)


async def until(condition: Callable[[], object], within_s: float = 3.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - all sorts of conditions
            await asyncio.sleep(0.005)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@contextlib.asynccontextmanager
async def started(
    network: MemoryNetwork, *names: str, boot: int = 1
) -> AsyncIterator[tuple[Device, ...]]:
    """Devices that have all met, each connected to each."""
    devices = [Device(network, name, boot) for name in names]
    for device in devices:
        await device.start()
    for device in devices:
        for other in devices:
            device.sees(other)
    for device in devices:
        for name in set(names) - {device.me.name}:
            await until(lambda d=device, n=name: d.neighbours.session_with(id_of(n)))  # type: ignore[misc]
    try:
        yield tuple(devices)
    finally:
        for device in devices:
            with contextlib.suppress(PeerLostError):
                await device.close()


def silence(network: MemoryNetwork, one: str, *others: str) -> None:
    for other in others:
        network.stall(one, other)
        network.stall(other, one)


async def test_a_silent_device_is_suspected_then_gone_then_back(network: MemoryNetwork) -> None:
    async with started(network, "a", "b", "c") as (a, _, _):
        began = asyncio.get_running_loop().time()
        silence(network, "c", "a", "b")
        await until(lambda: a.state("c") is SUSPECTED)
        await until(lambda: a.state("c") is GONE)
        took = asyncio.get_running_loop().time() - began
        assert 0.4 < took < 3.0
        assert str(a.facts("c")["problem"]).startswith("silent for ")
        assert a.state("b") is ALIVE
        assert a.neighbours.session_with(id_of("c")) is None
        for other in "ab":
            network.resume("c", other)
            network.resume(other, "c")
        await until(lambda: a.state("c") is ALIVE, 5.0)
        told = [state for name, state in a.history if name == "c"]
        assert told == [ALIVE, SUSPECTED, GONE, ALIVE]
        assert a.notices[0] == "Device c does not answer: silent for 0 s."


async def test_who_only_we_cannot_hear_is_not_gone(network: MemoryNetwork) -> None:
    async with started(network, "a", "b", "c") as (a, b, c):
        silence(network, "a", "c")
        await until(lambda: "b hears it" in str(a.facts("c")["problem"]))
        await asyncio.sleep(1.0)  # twice what silence is given
        assert a.state("c") is SUSPECTED
        assert (b.state("c"), b.state("a"), c.state("b")) == (ALIVE, ALIVE, ALIVE)
        silence(network, "b", "c")
        await until(lambda: a.state("c") is GONE)


async def test_a_device_that_breaks_off_is_gone_when_nobody_is_there(
    network: MemoryNetwork,
) -> None:
    async with started(network, "a", "b") as (a, b):
        await b.close(politely=False)
        await until(lambda: a.state("b") is GONE, 0.45)
        assert "refused" in str(a.facts("b")["problem"])


async def test_who_leaves_is_said_to_have_left_and_tried_rarely(network: MemoryNetwork) -> None:
    async with started(network, "a", "b") as (a, b):
        port = b.listener.address[1]
        await b.close()
        await until(lambda: a.state("b") is LEFT)
        assert a.facts("b")["problem"] == "it was stopped"
        (lost,) = [event for event in a.events if isinstance(event, Lost)]
        assert lost.problem == "it left: it was stopped"
        again = Device(network, "b", 2)
        await again.start(port)
        try:
            await asyncio.sleep(0.5)
            assert a.state("b") is LEFT  # nobody looks for it all the time
            again.sees(a)
            await until(lambda: a.state("b") is ALIVE)
            await until(lambda: a.neighbours.session_with(id_of("b")))  # and back, at once
            assert a.facts("b")["boot"] == 2
        finally:
            await again.close()


async def test_a_newer_run_takes_over_and_an_older_one_is_refused(network: MemoryNetwork) -> None:
    async with started(network, "a", "b", boot=3) as (a, b):
        old = a.neighbours.session_with(id_of("b"))
        assert old is not None
        newer, ghost = Device(network, "n", 4, device="b"), Device(network, "g", 2, device="b")
        for each in (newer, ghost):
            await each.start()
        try:
            session = await newer._dial(*a.listener.address)
            await until(lambda: a.facts("b")["boot"] == 4)
            await until(lambda: old.ended)
            assert not session.ended
            haunting = await ghost._dial(*a.listener.address)
            await until(lambda: haunting.ended)
            assert a.facts("b")["boot"] == 4
            assert not session.ended
            (line,) = [line for line in a.notices if line.startswith("Refused")]
            assert "started 2 times" in line
        finally:
            for each in (newer, ghost, b):
                await each.close(politely=False)


async def test_commands_are_no_members_and_may_ask(network: MemoryNetwork) -> None:
    async with started(network, "a", "b") as (a, _):
        command = Device(network, "x", 0)
        session = await command._dial(*a.listener.address)
        try:
            session.send(Goodbye("not a node", 0.0))
            members = await command.questions.members(session)
            assert [(each["name"], each["state"]) for each in members] == [
                ("a", "alive"),
                ("b", "alive"),
            ]
            assert a.state("x") is None
            session.send(PeerProbed(1, 0.0))  # nobody asked it
            await command.questions.members(session)
        finally:
            await session.close()
            command.membership.close()


async def test_a_phone_in_the_background_is_waited_for(network: MemoryNetwork) -> None:
    async with started(network, "a", "b") as (a, b):
        to_a = b.neighbours.session_with(id_of("a"))
        assert to_a is not None
        to_a.send(DeviceInfo("b", b.me.device_id, 1, 1, 1, "test", ("stub",), {"background": 1}))
        await asyncio.sleep(0.05)
        silence(network, "a", "b")
        await asyncio.sleep(0.9)
        assert a.state("b") is SUSPECTED
        assert a.facts("b")["problem"] != ""
        await until(lambda: a.state("b") is GONE, 1.5)


async def test_who_belongs_to_us_is_listed_and_nobody_else(network: MemoryNetwork) -> None:
    async with started(network, "a", "b") as (a, _):
        a.membership.belong([(id_of("b"), "b"), (id_of("y"), "attic"), (id_of("a"), "a")])
        assert [each["name"] for each in a.membership.seen()] == ["a", "b", "attic"]
        session = a.neighbours.session_with(id_of("b"))
        assert session is not None
        a.membership.belong([(id_of("y"), "attic")])
        assert [each["name"] for each in a.membership.seen()] == ["a", "attic"]
        assert session.ended


async def test_a_full_cluster_fits_into_one_answer(network: MemoryNetwork) -> None:
    device = Device(network, "a", 1)
    try:
        device.membership.belong((f"{number:064x}", "n" * 64) for number in range(300))
        answer = network_form(device)
        assert len(answer) == MAX_SHOWN
        assert answer[0]["name"] == "a"
    finally:
        device.membership.close()


def network_form(device: Device) -> tuple[dict[str, object], ...]:
    """What a device says of its members, after a journey over the wire."""

    class Sent:
        peer = device.me
        message: Message | None = None

        def send(self, message: Message) -> None:
            self.message = message

    sent = Sent()
    device.membership.take(sent, QueryMembers())  # type: ignore[arg-type]
    assert sent.message is not None
    data = b"".join(bytes(each) for each in encode(sent.message))
    (frame,) = FrameDecoder().feed(data)
    return decode(frame).members  # type: ignore[union-attr]
