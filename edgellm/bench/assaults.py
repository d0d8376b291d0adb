"""What strangers and failing disks do, in numbers: garbage, wrong codes, flipped bytes.

Each returns how many of its tries were found out; the promise is all of them.
"""

from __future__ import annotations

import asyncio
import random
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgellm.discovery.addresses import parse_address
from edgellm.errors import DeviceError, EdgeError, PairingError, RemoteProtocolError
from edgellm.identity import TrustStore
from edgellm.identity.invitation import TRIES, Invitation
from edgellm.identity.pairing import Inviter, Joiner
from edgellm.localcluster import LocalCluster
from edgellm.modelfile.manifest import ShardManifest
from edgellm.modelfile.model import Model
from edgellm.node import credentials_of
from edgellm.runtime.shares import Share, share_model
from edgellm.store.cache import ShardCache
from edgellm.store.digests import TensorDigests
from edgellm.transport.base import Buffer, Stream
from edgellm.transport.secure import SecureTransport
from edgellm.transport.tcp import TcpTransport
from edgellm.types import LayerSpan
from edgellm.wire.connection import Closed, Connection, Role
from edgellm.wire.frames import encode_frame
from edgellm.wire.messages import NETWORK_KINDS, PROTOCOL, Hello, Ping, encode

Tell = Callable[[str], None]
CLOSED_WITHIN_S = 0.1
"""How long a connection that sent garbage may stay open; longer is told of as late."""
FORGOTTEN_S = 2.0
"""One that is open for so long was not repelled at all."""
MORE_MEMORY_BYTES = 10 << 20
"""Most memory that a device may take for all the garbage that is thrown at it."""
DISK_BYTES = 1 << 30
DIAL_WITHIN_S = 5.0
_WARM = 8
_CHECKED_FROM = 12
"""Of a frame: what is before says how long it is, and a longer one would only be waited for."""
_TELL_EVERY = 1000


@dataclass(frozen=True, slots=True)
class Assault:
    """How one kind of assault ended."""

    name: str
    tries: int
    repelled: int
    worst_s: float = 0.0
    """Longest time until one was repelled, where that counts."""
    more_bytes: int = 0
    """Memory that the device under assault took for all of it."""
    late: int = 0
    """Repelled, but after more than ``CLOSED_WITHIN_S``: on a busy machine, or by a slow node."""

    @property
    def met(self) -> bool:
        """Whether what is promised was kept."""
        return self.repelled == self.tries and self.more_bytes <= MORE_MEMORY_BYTES

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "tries": self.tries,
            "repelled": self.repelled,
            "worst_s": round(self.worst_s, 4),
            "more_bytes": self.more_bytes,
            "late": self.late,
        }


# --- flipped bytes --------------------------------------------------------------------


async def flipped_bytes(model: Model, count: int, seed: int) -> Assault:
    """One byte of a shard on disk changed, ``count`` times: each must be seen before loading."""
    span = LayerSpan(0, max(1, model.layers // 2))
    with tempfile.TemporaryDirectory(prefix="edgellm-flips-") as folder:
        share = await share_model(model, [span], TensorDigests(Path(folder) / "digests"))
        return await asyncio.to_thread(_flip, model, share, Path(folder) / "cache", count, seed)


def _flip(model: Model, share: Share, folder: Path, count: int, seed: int) -> Assault:
    chance = random.Random(f"flips {seed}")
    manifest = ShardManifest.decode(share.manifests[share.files[0][0].manifest])
    cache = ShardCache(folder, DISK_BYTES)
    cache.sweep()
    caught = 0
    for _ in range(count):
        path = _whole_shard(cache, manifest, model)
        with path.open("r+b") as file:
            at = chance.randrange(manifest.file_bytes)
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
        held = cache.find(manifest)
        caught += held is None
        if held is not None:
            held.release()
    return Assault("flipped bytes", count, caught)


def _whole_shard(cache: ShardCache, manifest: ShardManifest, model: Model) -> Path:
    """The shard's file, made good again from the model."""
    assembly = cache.assemble(manifest, models=(model,))
    try:
        held = assembly.finish()
        held.release()
        return held.path
    finally:
        assembly.close()


# --- wrong codes ----------------------------------------------------------------------


def wrong_codes(count: int, seed: int, tell: Tell) -> Assault:
    """``count`` guesses by strangers that follow the protocol to the letter. An invitation that has
    had three is over, and the next one is opened: what a patient person would do for them."""
    chance = random.Random(f"codes {seed}")
    refused = made = 0
    with ExitStack() as stack:
        homes = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgellm-codes-")))
            for _ in range(2)
        ]
        ours, stranger = map(TrustStore, homes)
        ours.found("ours")
        while made < count:
            invitation = Invitation(0.0)
            for _ in range(TRIES + 1):
                code = f"{chance.randrange(10**8):08d}"
                if code == invitation.code:
                    continue  # one in a hundred million, and no wrong code
                refused += _is_refused(ours, stranger, invitation, code, now=float(made % 60))
                made += 1
                if made % _TELL_EVERY == 0:
                    tell(f"wrong codes: {made} of {count}")
    if ours.trusted(stranger.identity.device_id):
        refused = 0
    return Assault("wrong codes", made, refused)


def _is_refused(
    ours: TrustStore, stranger: TrustStore, invitation: Invitation, code: str, now: float
) -> bool:
    inviter = Inviter(ours, invitation, now)
    joiner = Joiner(stranger, "stranger", code, now)
    data = joiner.start()
    while data:
        answer = inviter.receive(data, now)
        data = joiner.receive(answer, now) if answer else b""
    try:
        inviter.result  # noqa: B018 - it raises
    except PairingError:
        return True
    return False


# --- garbage --------------------------------------------------------------------------


def garbage(chance: random.Random) -> bytes:
    """Bytes that no peer of ours sends: noise, broken frames, frames whose content is wrong."""
    kind = chance.choice(sorted(NETWORK_KINDS))
    match chance.randrange(6):
        case 0:
            return b"\x00" + chance.randbytes(chance.randrange(15, 200))
        case 5:  # what looks like the beginning of a TLS handshake
            noise = chance.randbytes(chance.randrange(16, 600))
            return b"\x16\x03\x01" + len(noise).to_bytes(2, "big") + noise
        case 1:  # a length that nobody allows
            return struct.pack("<2sBBIII", b"eL", PROTOCOL, kind, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        case 2:  # a checksum that is wrong
            frame = bytearray(b"".join(encode(Ping(1))))
            frame[chance.randrange(_CHECKED_FROM, len(frame))] ^= 1 << chance.randrange(8)
            return bytes(frame) + bytes(64)
        case 3:  # nested lists: a bomb
            return b"".join(encode_frame(kind, b"\x91" * chance.randrange(2, 60_000)))
        case _:  # no such fields
            return b"".join(encode_frame(kind, b"\xdd\xff\xff\xff\xff" + chance.randbytes(8)))


def garbage_into_connections(count: int, seed: int) -> Assault:
    """As a paired device could send it, into the connection's state machine."""
    chance = random.Random(f"garbage {seed}")
    hello = b"".join(encode(Hello(PROTOCOL, "a", "b" * 64, "c")))
    repelled, worst = 0, 0.0
    for _ in range(count):
        connection = Connection(Role.LISTENER, 0.0, name="x", device_id="y", software="z")
        connection.receive(hello, 0.0)
        began = time.perf_counter()
        events = connection.receive(garbage(chance), 0.0)
        worst = max(worst, time.perf_counter() - began)
        last = events[-1] if events else None
        repelled += isinstance(last, Closed) and isinstance(last.reason, RemoteProtocolError)
    return Assault("garbage frames, state machine", count, repelled, worst)


async def garbage_into_node(local: LocalCluster, count: int, seed: int) -> list[Assault]:
    """Into a running node: half from a stranger before any handshake, half from a paired device.
    The node must close each connection soon, take little memory for it, and go on."""
    chance = random.Random(f"node {seed}")
    node = local.nodes[0]
    host, port = parse_address(node.address)
    process = psutil.Process(node.process.pid)
    trust = TrustStore(local.home)
    hello = encode(Hello(PROTOCOL, "garbage", trust.identity.device_id, "garbage"))
    paired, strange = SecureTransport(credentials_of(trust)), TcpTransport()
    assaults = []
    for name, transport, tries in (
        ("garbage of strangers", strange, count - count // 2),
        ("garbage of a paired device", paired, count // 2),
    ):
        greeting = hello if transport is paired else []

        async def thrown() -> float:
            stream = await transport.dial(host, port, DIAL_WITHIN_S)  # noqa: B023 - awaited below
            return await _thrown(stream, [*greeting, garbage(chance)])  # noqa: B023

        for _ in range(_WARM):  # what is made once is made then
            await thrown()
        before, repelled, worst, late = process.memory_info().rss, 0, 0.0, 0
        for _ in range(tries):
            took = await thrown()
            repelled += took <= FORGOTTEN_S
            late += CLOSED_WITHIN_S < took <= FORGOTTEN_S
            worst = max(worst, took)
        more = process.memory_info().rss - before
        assaults.append(Assault(name, tries, repelled, worst, max(0, more), late))
    if node.process.returncode is not None:
        raise DeviceError("its node ended under garbage.", device=node.device.name)
    return assaults


async def _thrown(stream: Stream, data: Sequence[Buffer]) -> float:
    """Seconds until the other side closed the connection."""
    try:
        began = time.perf_counter()
        stream.write(data)
        await _ended(stream)
        return time.perf_counter() - began
    finally:
        stream.close()


async def _ended(stream: Stream) -> None:
    try:
        async with asyncio.timeout(5.0):
            while await stream.read(1 << 16):
                pass
    except (EdgeError, TimeoutError):
        pass
