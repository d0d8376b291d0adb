"""How trust spreads between nodes, over connections in memory and real trust stores."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import DeviceError, NotPairedError
from edgellm.identity import TrustStore, make_identity
from edgellm.localcluster import pair_homes
from edgellm.runtime import introductions as module
from edgellm.runtime.introductions import Introductions
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.base import Stream
from edgellm.transport.memory import MemoryNetwork
from edgellm.wire.frames import Frame
from edgellm.wire.messages import Message
from edgellm.wire.trust import Introduce
from tests.inline import until


class Device:
    """A node's part that introduces others, and nothing else of it."""

    def __init__(self, network: MemoryNetwork, folder: Path, name: str) -> None:
        self.trust = TrustStore(folder / name)
        self.id = self.trust.identity.device_id
        self.name, self.boot = name, 1
        self.notices: list[str] = []
        self.changes = 0
        self.sessions: list[Session] = []
        self.introductions = Introductions(
            self.trust, on_change=self._changed, on_notice=self.notices.append
        )
        self.transport = network.transport(name)

    @property
    def me(self) -> Introduction:
        return Introduction(self.name, self.id, "test", self.boot)

    def _changed(self) -> None:
        self.changes += 1

    async def listen(self) -> None:
        async def accept(stream: Stream) -> None:
            await Session.accept(stream, self.me, self, on_open=self._opened)

        self.listener = await self.transport.listen(f"127.0.1.{ord(self.name)}", 0, accept)

    async def dial(self, other: Device) -> Session:
        session = await Session.dial(self.transport, *other.listener.address, self.me, self)
        self._opened(session)
        return session

    def _opened(self, session: Session) -> None:
        self.sessions.append(session)
        self.introductions.opened(session)

    def trusts(self, *others: Device) -> bool:
        return all(self.introductions.trusts(other.id) for other in others)

    def on_frame(self, session: Session, frame: Frame) -> None: ...

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        assert self.introductions.take(session, message)

    def on_session_closed(self, session: Session) -> None: ...

    async def close(self) -> None:
        await self.introductions.close()
        await self.listener.close()


@contextlib.asynccontextmanager
async def devices(folder: Path, names: str, *pairs: str) -> AsyncIterator[list[Device]]:
    """Devices of one letter each; those of each of ``pairs`` know each other."""
    for pair in pairs:
        pair_homes({folder / name: name for name in pair})
    network = MemoryNetwork()
    made = [Device(network, folder, name) for name in names]
    try:
        for each in made:
            await each.listen()
        yield made
    finally:
        for each in made:
            await each.close()


def introduce(device: Device, by: str, **changed: Any) -> Introduce:
    """A record of a device as it might be told."""
    said = Introduce(device.id, device.name, 1, False, by, device.trust.identity.certificate)
    return replace(said, **changed)


async def test_who_is_let_in_by_one_is_known_to_all(tmp_path: Path) -> None:
    """c joins by b while a is connected to b; a hears of it, then c connects to a and hears too."""
    async with devices(tmp_path, "abc", "ab") as (a, b, c):
        await a.dial(b)
        assert not a.trusts(c)
        b.trust.add(c.id, "c", c.trust.identity.certificate)
        c.trust.adopt(b.trust.cluster_id, b.trust.members)
        await until(lambda: a.trusts(c))
        assert a.notices == ["Device c belongs to the cluster now: b let it in."]
        assert b.notices == []
        assert (a.changes, b.changes) == (1, 1)
        await c.dial(a)
        assert c.trusts(a, b)
        assert TrustStore(tmp_path / "a").trusted(c.id), "it is on the disk"


async def test_records_are_told_at_every_new_connection(tmp_path: Path) -> None:
    """What changed while nobody was connected."""
    async with devices(tmp_path, "abc", "abc") as (a, b, c):
        a.trust.forget(c.id)
        session = await b.dial(a)
        await until(lambda: not b.trusts(c))
        assert b.notices == ["Device c does not belong to the cluster any more: a has put it out."]
        assert not session.ended


async def test_who_is_forgotten_is_disconnected_everywhere_and_told(tmp_path: Path) -> None:
    async with devices(tmp_path, "abc", "abc") as (a, b, c):
        with_b, with_c, other = await a.dial(b), await a.dial(c), await b.dial(c)
        a.trust.forget(c.id)
        assert with_c.ended, "at once, in the same turn"
        assert isinstance(with_c._reason, NotPairedError)
        await until(lambda: other.ended and all(session.ended for session in c.sessions))
        assert "does not belong to this cluster any more" in c.sessions[0].reason
        assert not with_b.ended
        await until(lambda: bool(c.notices))
        assert c.notices[0].startswith("a has put this device out of the cluster. To come back")
        assert c.trust.expelled
        assert not c.trusts(a) and not c.trusts(b) and c.trusts(c)
        again = await c.dial(a)
        await until(lambda: again.ended and a.sessions[-1].ended)


async def test_a_session_that_began_too_early_ends_when_it_opens(tmp_path: Path) -> None:
    async with devices(tmp_path, "ab", "ab") as (a, b):
        a.introductions._stop_listening()
        a.trust.forget(b.id)
        session = await a.dial(b)
        assert session.ended


async def test_clients_introduce_nobody_and_are_told_nothing(tmp_path: Path) -> None:
    async with devices(tmp_path, "abc", "ab") as (a, b, c):
        b.boot = 0
        session = await b.dial(a)
        session.send(introduce(c, by=b.id))
        await until(lambda: session.ended)
        assert not a.trusts(c)
        assert "only nodes introduce" in a.sessions[0].reason


@pytest.mark.parametrize("lie", ["certificate", "id", "no-certificate", "name"])
async def test_a_record_that_is_not_what_it_says_ends_the_session(lie: str, tmp_path: Path) -> None:
    async with devices(tmp_path, "abc", "ab") as (a, b, c):
        session = await b.dial(a)
        stranger = make_identity()
        lies: dict[str, dict[str, Any]] = {
            "certificate": {"payload": stranger.certificate},
            "id": {"device_id": stranger.device_id},
            "no-certificate": {"payload": b"\x30\x03\x02\x01\x00"},
            "name": {"name": "a name with spaces"},
        }
        session.send(introduce(c, by=b.id, **lies[lie]))
        await until(lambda: session.ended)
        assert len(a.trust.members) == 2


async def test_a_record_with_a_lower_version_changes_nothing(tmp_path: Path) -> None:
    async with devices(tmp_path, "abc", "abc") as (a, b, c):
        session = await b.dial(a)
        a.trust.forget(c.id)
        version = a.trust.members.get(c.id)
        session.send(introduce(c, by=b.id))
        await until(lambda: not b.trusts(c))
        assert a.trust.members.get(c.id) == version
        assert not session.ended


async def test_nobody_lets_itself_in_again(tmp_path: Path) -> None:
    """b was forgotten while a was off, and would be back for all if a took b's own word for it."""
    async with devices(tmp_path, "abc", "abc") as (a, b, c):
        c.trust.forget(b.id)
        session = await b.dial(a)
        session.send(introduce(b, by=a.id, version=9))
        session.send(introduce(c, by=c.id, version=9))  # of others it may tell
        await until(lambda: _version(a, c) == 9)
        assert _version(a, b) == 1
        await c.dial(a)
        await until(lambda: session.ended)
        assert not a.trusts(b) and not c.trusts(b)


def _version(device: Device, of: Device) -> int:
    record = device.trust.members.get(of.id)
    assert record is not None
    return record.version


async def test_a_change_of_another_process_counts_here_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_INTERVAL_S", 0.02)
    async with devices(tmp_path, "abc", "ab") as (a, b, c):
        session = await a.dial(b)
        pair_homes({tmp_path / "a": "a", tmp_path / "c": "c"})
        await until(lambda: a.trusts(c) and b.trusts(c))
        TrustStore(tmp_path / "a").forget(b.id)
        await until(lambda: session.ended)


async def test_a_store_that_cannot_be_written_costs_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with devices(tmp_path, "abc", "ab") as (a, b, c):
        session = await b.dial(a)

        def full(records: object) -> bool:
            raise DeviceError("the disk is full.")

        monkeypatch.setattr(a.trust, "merge", full)
        for _ in range(2):
            session.send(introduce(c, by=b.id))
        await until(lambda: bool(a.notices))
        assert a.notices == ["Device c is not known here now: the disk is full."]
        assert not session.ended
