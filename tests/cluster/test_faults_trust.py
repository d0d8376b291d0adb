"""What a device meets that trusts only its own: strangers, copies of devices, paired devices that
claim to be others.

Pairing itself is in test_pairing; garbage, guessed codes and flipped bytes are in test_chaos.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgellm.errors import PeerLostError
from edgellm.identity import TrustStore, load_identity
from edgellm.node import credentials_of
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.secure import SecureTransport
from edgellm.wire.frames import Frame
from edgellm.wire.messages import Message
from tests.cluster.joined import joined
from tests.cluster.processes import finish, pair_homes, start, told, wait_for

# --- copied and claimed identities ----------------------------------------------------


def test_of_a_device_and_its_copy_the_newer_start_wins(tmp_path: Path) -> None:
    """A home that was copied while its node ran: the same key, started elsewhere."""
    pair_homes(tmp_path / "watcher", tmp_path / "twin")
    with (
        joined(tmp_path, "watcher", {}) as watcher,
        joined(tmp_path, "twin", {}, "--peer", watcher.address) as first,
    ):
        wait_for(lambda: "Found device twin" in watcher.said())
        shutil.copytree(tmp_path / "twin", tmp_path / "copy")
        options = ("--name", "twin", "--peer", watcher.address)
        with joined(tmp_path, "copy", {}, *options) as copy:
            wait_for(
                lambda: "Refused an older run of device twin, or a copy of it" in watcher.said()
            )
            wait_for(lambda: f"Found device twin at {copy.address}" in watcher.said())
            arguments = ["devices", "--home", str(tmp_path / "watcher"), "--json", "--discovery"]
            ended = finish(start(arguments, tmp_path))
            assert ended.code == 0, ended.err
            (twin,) = [each for each in ended.json["devices"] if each["name"] == "twin"]
            assert (twin["state"], twin["address"]) == ("alive", copy.address)
            assert copy.said().count("Lost device") == 0
            assert first.process.poll() is None


def test_a_device_that_is_not_paired_is_refused_and_both_sides_say_so(tmp_path: Path) -> None:
    """It has a cluster of its own, and knows the address."""
    with joined(tmp_path, "node", {}) as node, joined(tmp_path, "stranger", {}) as stranger:
        for asked in (["devices"], ["chat", "--model", "stub:4", "--prompt", "Hello"]):
            home = ["--home", str(tmp_path / "stranger")]
            process = start([*asked, *home, "--peer", node.address, "--json"], tmp_path)
            error = told(finish(process), 4, node.address, "edgellm invite")
            assert error["code"] == "not_paired"
        wait_for(lambda: "not paired" in node.said())
        assert "Found device" not in node.said() + stranger.said()


class Silent:
    """Takes what comes."""

    def on_frame(self, session: Session, frame: Frame) -> None:
        del session, frame

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        del session, message, frame

    def on_session_closed(self, session: Session) -> None:
        del session


async def test_a_paired_device_that_claims_another_ones_id_is_refused(tmp_path: Path) -> None:
    """What a greeting says does not count against the key that the connection was made with."""
    pair_homes(*(tmp_path / name for name in ("node", "other", "liar")))
    other = load_identity(tmp_path / "other").device_id
    with joined(tmp_path, "node", {}) as node:
        host, port = node.address.split(":")
        transport = SecureTransport(credentials_of(TrustStore(tmp_path / "liar")))
        honest = Introduction("liar", load_identity(tmp_path / "liar").device_id, "test")
        session = await Session.dial(transport, host, int(port), honest, Silent())
        await session.close()
        lie = replace(honest, name="other", device_id=other, boot=1 << 40)
        with pytest.raises(PeerLostError):
            session = await Session.dial(transport, host, int(port), lie, Silent())
            ended = asyncio.Event()
            session.on_close(lambda reason: ended.set())
            async with asyncio.timeout(5.0):
                await ended.wait()
            raise PeerLostError(session.reason)
        # The real one is not kept out by what was claimed in its name.
        with joined(tmp_path, "other", {}, "--peer", node.address):
            wait_for(lambda: "Found device other" in node.said())
