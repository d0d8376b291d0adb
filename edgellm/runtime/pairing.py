"""The way of a pairing over a stream: glue around the state machines of ``identity.pairing``.

It decides nothing about trust. Streams are plain here: what crosses them is safe to be seen and
changed by anybody, and whoever is not paired yet has no other way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from edgellm.discovery.addresses import Address
from edgellm.errors import EdgeError, PairingError, PeerLostError
from edgellm.identity import Member, TrustStore
from edgellm.identity.invitation import Invitation, Reason
from edgellm.identity.pairing import Inviter, Joiner
from edgellm.identity.refusals import RefusedError
from edgellm.transport.base import Stream, Transport
from edgellm.transport.tcp import TcpTransport

CONNECT_WITHIN_S = 5.0
STAGGER_S = 0.15
"""Head start of an address over the next one."""
BUSY_TRIES = 3
BUSY_WAIT_S = 2.1
"""After so long a device that others keep busy takes us; see ``Invitation.begin``."""
_READ_BYTES = 1 << 16
_LAST_WORDS_S = 1.0
"""How long the other side has to take a refusal: closing at once may destroy it on its way."""
_SOMEBODY_ELSE = (Reason.UNPROVEN, Reason.NO_INVITATION, Reason.ITSELF)
"""Said by who is perhaps another device than the one that is meant."""


@dataclass(frozen=True, slots=True)
class Paired:
    """What came of joining."""

    inviter: Member
    address: Address
    """Where it was reached."""
    others: tuple[Member, ...]
    """Everybody in the cluster but this device."""


async def serve_pairing(stream: Stream, trust: TrustStore, invitation: Invitation | None) -> Member:
    """Serve a device that wants to join, to the end; who was let in, and is in the trust store.

    Raises PairingError with what people here should know of one that was not. The stream is to be
    closed by the caller.
    """
    inviter = Inviter(trust, invitation, _now())
    await _converse(stream, inviter)
    with contextlib.suppress(TimeoutError, PeerLostError):
        async with asyncio.timeout(_LAST_WORDS_S):
            while await stream.read(_READ_BYTES):
                pass
    return inviter.result


async def join_at(
    addresses: Sequence[Address],
    code: str,
    trust: TrustStore,
    name: str,
    *,
    inviter_id: str = "",
    transport: Transport | None = None,
) -> Paired:
    """Join the cluster of the device at one of ``addresses``, the likeliest first.

    ``inviter_id``: which device it has to be; empty: whichever shows this code there. Afterwards
    the trust store has the cluster. Raises RefusedError, which costs the inviter a try where its
    reason is a wrong code, another PairingError, DeviceError where it cannot be written down, or
    PeerLostError where nobody is there. Takes about 10 s at most for each that answers.
    """
    for _ in range(BUSY_TRIES - 1):
        try:
            return await _join_once(addresses, code, trust, name, inviter_id, transport)
        except RefusedError as error:
            if error.reason is not Reason.BUSY:
                raise
        await asyncio.sleep(BUSY_WAIT_S)
    return await _join_once(addresses, code, trust, name, inviter_id, transport)


async def _join_once(
    addresses: Sequence[Address],
    code: str,
    trust: TrustStore,
    name: str,
    inviter_id: str,
    transport: Transport | None,
) -> Paired:
    problems: list[EdgeError] = []
    async with aclosing(_connections(transport or TcpTransport(), addresses, problems)) as streams:
        async for address, stream in streams:
            joiner = Joiner(trust, name, code, _now(), inviter_id=inviter_id)
            try:
                await _converse(stream, joiner, joiner.start())
                joined = joiner.result
            except RefusedError as error:
                if error.reason not in _SOMEBODY_ELSE:
                    raise
                problems.insert(0, error)  # it answered, so it says more than who did not
                continue
            joined.adopt(trust)
            return Paired(joined.inviter, address, trust.others)
    if problems:
        raise problems[0]
    raise PeerLostError("no address of the inviting device is known.")


async def _connections(
    transport: Transport, addresses: Sequence[Address], problems: list[EdgeError]
) -> AsyncGenerator[tuple[Address, Stream], None]:
    """Open streams, the quickest first; each is closed when the next one is asked for."""

    async def dial(place: int, address: Address) -> tuple[Address, Stream]:
        await asyncio.sleep(place * STAGGER_S)
        return address, await transport.dial(*address, CONNECT_WITHIN_S)

    tasks = [asyncio.create_task(dial(*each)) for each in enumerate(dict.fromkeys(addresses))]
    try:
        for done in asyncio.as_completed(tasks):
            try:
                address, stream = await done
            except EdgeError as error:
                problems.append(error)
                continue
            yield address, stream
            stream.close()
    finally:
        for task in tasks:
            task.cancel()
        for each in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(each, tuple):
                each[1].close()


async def _converse(stream: Stream, side: Inviter | Joiner, first: bytes = b"") -> None:
    """Carry bytes until this side is finished. Raises nothing of the network's: ``side.result``
    then says that the other side ended it."""
    try:
        if first:
            stream.write([first])
        while not side.finished:
            data, late = b"", False
            try:
                async with asyncio.timeout_at(side.deadline):
                    data = await stream.read(_READ_BYTES)
            except TimeoutError:
                late = True
            if not data and not late:
                side.close()
                return
            answer = side.receive(data, _now())
            if answer:
                stream.write([answer])
    except PeerLostError:
        side.close()


def _now() -> float:
    return asyncio.get_running_loop().time()


def tries_left(error: PairingError) -> int:
    """How many other codes may be tried after this error."""
    if isinstance(error, RefusedError) and error.reason is Reason.WRONG_CODE:
        return error.tries_left
    return 0
