"""The devices around a node: one connection to each, for as long as both are there.

It carries out what ``discovery.directory`` decides: dials who is due, greets, listens for the end.
Devices tell each other whom they reach (gossip), so that one that is found by a single other
finds all. Whatever is said of a device is a hint; only its own greeting counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.discovery.addresses import (
    Address,
    Interface,
    candidates,
    format_address,
    is_loopback,
    on_this_machine,
    split_scope,
)
from edgellm.discovery.base import MAX_ADDRESSES, Discovery, How, Sighting, sighting_from
from edgellm.discovery.directory import Attempt, Directory, State, Verdict
from edgellm.discovery.interfaces import machine_interfaces
from edgellm.discovery.known import KnownDevices
from edgellm.discovery.strangers import Strangers, stranger_facts
from edgellm.errors import DeadlineError, EdgeError, NotPairedError
from edgellm.runtime.reach import Answer, Dial, OtherDeviceError, reach
from edgellm.runtime.session import Session
from edgellm.wire.messages import KnownPeers, PeerAddress, QueryPeers

MAX_ATTEMPTS = 32
"""Devices that are being tried at once."""
MAX_TOLD = 256
"""Addresses in one message of gossip."""
TOLD_ADDRESSES = 4
"""Of each device but ourselves: the one where we reach it, and some more."""
ASK_INTERVAL_S = 30.0
"""How often neighbours are asked again whom they reach: news that was lost is not lost for ever."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A device that was seen, as it is now."""

    device_id: str
    name: str
    """Empty while only others said something about it."""
    host: str
    """Where it is, or was last, or may be."""
    port: int
    state: State
    since: float
    """When it came to be in this state: the event loop's clock."""
    round_trip_s: float | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something to tell people."""

    name: str
    device_id: str
    """Empty where only an address is known."""
    address: str
    """``HOST:PORT``."""
    problem: str = ""
    """Why it was lost, or cannot be reached; without the full stop."""


@dataclass(frozen=True, slots=True)
class Found(Event):
    """A device was reached."""


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """Its connection ended. It is tried again."""


@dataclass(frozen=True, slots=True)
class Unreachable(Event):
    """It was announced or told, and does not answer. It is tried on; this is said once."""


class Neighbours:
    """See the module. Also the ``Directory`` of ``runtime.services``."""

    def __init__(
        self,
        device_id: str,
        name: str,
        dial: Dial,
        *,
        own: Callable[[], Sequence[Address]],
        remember: KnownDevices | None = None,
        this_machine_only: bool = False,
        trusted: Callable[[str], bool] = lambda device_id: True,
        interfaces: Callable[[], Sequence[Interface]] = machine_interfaces,
        on_event: Callable[[Event], None] = lambda event: None,
        on_failed: Callable[[str, str], None] = lambda device_id, problem: None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``own`` tells where this node can be reached. ``on_failed`` hears of every attempt at a
        device that found nobody: its id, and why. With ``this_machine_only`` nobody on
        another machine is dialed, but who was told by a person. Devices that are not ``trusted``
        are only kept in mind."""
        self._me = device_id
        self._name = name
        self._dial = dial
        self._own = own
        self._ways: Sequence[Discovery] = ()
        self._remember = remember
        self._this_machine_only = this_machine_only
        self._trusted = trusted
        self._strangers = Strangers()
        self._interfaces = interfaces
        self._on_event = on_event
        self._on_failed = on_failed
        self._leaving: dict[str, str] = {}
        self._directory = Directory(device_id, chance)
        self._reached: dict[str, Answer] = {}
        self._attempts: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._unsaved = asyncio.Event()
        self._closed = False

    async def start(self, ways: Sequence[Discovery] = ()) -> None:
        """Look for devices in all these ways, and connect to those that are found, until closed."""
        self._ways = ways
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._ask_again())]
        if self._remember is not None:
            self._tasks.append(asyncio.create_task(self._save(self._remember)))
        for way in ways:
            await way.start(self.saw)

    async def close(self) -> None:
        """Look for nobody and hang up."""
        self._closed = True
        tasks = [*self._tasks, *self._attempts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(way.close() for way in self._ways), return_exceptions=True)
        if self._remember is not None and self._unsaved.is_set():
            self._remember.save(self._directory.remembered())
        sessions = [answer.session for answer in self._reached.values()]
        self._reached.clear()
        await asyncio.gather(*(session.close() for session in sessions))

    # --- for others -------------------------------------------------------------------

    def peers(self) -> tuple[Neighbour, ...]:
        """Everyone that was seen, in the order in which they were."""
        return tuple(
            Neighbour(
                device.device_id,
                device.name,
                *(device.at or next(iter(device.addresses), ("", 0))),
                device.state,
                device.since,
                reached.round_trip_s if (reached := self._reached.get(device.device_id)) else None,
            )
            for device in self._directory.devices()
        )

    def session_with(self, device_id: str) -> Session | None:
        """The open connection to a device, if it is reached."""
        reached = self._reached.get(device_id)
        return None if reached is None else reached.session

    async def wait_for(
        self, condition: Callable[[tuple[Neighbour, ...]], bool], within_s: float
    ) -> tuple[Neighbour, ...]:
        """The neighbours, as soon as ``condition`` holds for them. Raises DeadlineError."""
        try:
            async with asyncio.timeout(within_s):
                while not condition(self.peers()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise DeadlineError(f"not all devices were found within {within_s:g} s.") from error
        return self.peers()

    def saw(self, sighting: Sighting) -> None:
        """Take a hint, from whatever way of finding devices."""
        if self._closed:
            return
        if sighting.device_id and not self._trusted(sighting.device_id):
            self._strangers.saw(sighting)
            return
        if not self._allowed(sighting):
            return
        self._directory.saw(sighting, self._loop.time())
        self._changed.set()
        self._wake.set()

    def strangers(self) -> tuple[dict[str, Any], ...]:
        """Devices that announce themselves on our networks and do not belong to us, each as plain
        data: see ``stranger_facts``."""
        return tuple(map(stranger_facts, self._strangers.announced()))

    def trust_changed(self) -> None:
        """Somebody came to belong to us, or does no more."""
        for sighting in self._strangers.take(self._trusted):
            self.saw(sighting)
        for device in self._directory.devices():
            if not self._trusted(device.device_id):
                self._directory.forget(device.device_id)
        for device_id, answer in list(self._reached.items()):
            if not self._trusted(device_id):
                del self._reached[device_id]
                answer.session.end(NotPairedError("it does not belong to this cluster any more."))
        self._changed.set()

    def soon(self, device_id: str) -> None:
        """There is reason to try this device now, if it is known where."""
        self._leaving.pop(device_id, None)
        self._directory.soon(device_id, self._loop.time())
        self._wake.set()

    def leaving(self, device_id: str, reason: str) -> None:
        """A device says that it will end: it is not to be tried all the time when it is gone."""
        if device_id in self._reached:
            self._leaving[device_id] = f"it left: {reason}" if reason else "it left"

    def _allowed(self, sighting: Sighting) -> bool:
        """Who does not let others in from the network does not go out to it unasked."""
        if not self._this_machine_only or sighting.how is How.TOLD:
            return True
        return on_this_machine(sighting.addresses, self._interfaces())

    def known(self) -> tuple[PeerAddress, ...]:
        """What to tell who asks whom we reach: ourselves, with all our addresses, and them."""
        ours = [PeerAddress(self._me, self._name, *address) for address in self._own()]
        told = ours[:MAX_ADDRESSES]
        for device in self._directory.devices():
            if device.state is State.REACHED and device.at is not None:
                told += self._told(device.device_id, device.name, device.at, device.addresses)
        return tuple(told[:MAX_TOLD])

    @staticmethod
    def _told(
        device_id: str, name: str, at: Address, addresses: Iterable[Address]
    ) -> list[PeerAddress]:
        some = list(dict.fromkeys([at, *addresses]))[:TOLD_ADDRESSES]
        # A name means something else elsewhere; where it was looked up is an address.
        numeric = [address for address in some if split_scope(address[0]) is not None]
        return [PeerAddress(device_id, name, *address) for address in numeric]

    def on_known_peers(self, session: Session, message: KnownPeers) -> None:
        """A device says whom it reaches, and where it is itself."""
        by_device: dict[str, tuple[str, list[Address]]] = {}
        for peer in message.peers:
            address = _from_afar(peer, session)
            if address is not None:
                by_device.setdefault(peer.device_id, (peer.name, []))[1].append(address)
        sender = session.peer.device_id
        seen_at = session.address.rpartition(":")[0].strip("[]")
        for device_id, (name, addresses) in by_device.items():
            if device_id == sender:
                # Where it comes from is where it is, as far as we are concerned.
                ports = dict.fromkeys(port for _, port in addresses)
                addresses[:0] = [(seen_at, port) for port in ports]
            sighting = sighting_from(device_id, name, addresses, How.GOSSIP)
            if sighting is not None:
                self.saw(sighting)

    # --- connecting -------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = self._loop.time()
            for attempt in self._directory.due(now, MAX_ATTEMPTS - len(self._attempts)):
                task = asyncio.create_task(self._try(attempt))
                self._attempts.add(task)
                task.add_done_callback(self._tried)
            due = self._directory.next_due()
            wait = None if due is None else max(0.0, due - self._loop.time())
            if len(self._attempts) >= MAX_ATTEMPTS:
                wait = None  # the end of an attempt wakes us
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _tried(self, task: asyncio.Task[None]) -> None:
        self._attempts.discard(task)
        self._wake.set()

    async def _try(self, attempt: Attempt) -> None:
        own = tuple(self._own())
        addresses: Sequence[Address] = attempt.addresses
        if attempt.device_id:
            addresses = candidates(addresses, self._interfaces(), own)
        try:
            answer = await reach(self._dial, addresses, attempt.device_id)
        except OtherDeviceError as error:
            for other in error.answers:
                self._greeted(attempt, other)
            self._failed(attempt, error)
        except EdgeError as error:
            self._failed(attempt, error)
        else:
            verdict = self._greeted(attempt, answer)
            if verdict is Verdict.NEW and not answer.session.ended:
                self._keep(answer)
            else:
                if verdict is Verdict.NEW:
                    self._directory.lost(answer.session.peer.device_id, self._loop.time())
                await answer.session.close()

    def _greeted(self, attempt: Attempt, answer: Answer) -> Verdict:
        peer, now = answer.session.peer, self._loop.time()
        return self._directory.reached(attempt, peer.device_id, peer.name, answer.address, now)

    def _failed(self, attempt: Attempt, error: EdgeError) -> None:
        if attempt.device_id:
            self._on_failed(attempt.device_id, error.message.rstrip("."))
        if not self._directory.failed(attempt, self._loop.time()):
            return
        names = {d.device_id: d.name for d in self._directory.devices()}
        where = ", ".join(format_address(*each) for each in attempt.addresses)
        name = names.get(attempt.device_id, "")
        hint = f" {error.hint}" if isinstance(error, NotPairedError) and error.hint else ""
        problem = f"{error.message}{hint}".rstrip(".")
        self._on_event(Unreachable(name, attempt.device_id, where, problem))

    def _keep(self, answer: Answer) -> None:
        session, device_id = answer.session, answer.session.peer.device_id
        self._reached[device_id] = answer
        address = format_address(*answer.address)
        name = session.peer.name

        def ended(reason: str) -> None:
            if self._reached.get(device_id) is answer:
                del self._reached[device_id]
                why = self._leaving.pop(device_id, None)
                self._directory.lost(device_id, self._loop.time(), on_purpose=why is not None)
                self._on_event(Lost(name, device_id, address, why or reason))
                self._changed.set()
                self._wake.set()

        self._on_event(Found(name, device_id, address))
        self._unsaved.set()
        self._changed.set()
        session.on_close(ended)
        session.send(KnownPeers(self.known()))
        session.send(QueryPeers())
        news = self._told(device_id, name, answer.address, ())
        for other in list(self._reached.values()):
            if other is not answer and news:
                other.session.send(KnownPeers(tuple(news)))

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(ASK_INTERVAL_S)
            for answer in list(self._reached.values()):
                answer.session.send(QueryPeers())

    async def _save(self, remember: KnownDevices) -> None:
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            devices = self._directory.remembered()
            saving = asyncio.ensure_future(asyncio.to_thread(remember.save, devices))
            try:
                await asyncio.shield(saving)
            except asyncio.CancelledError:
                await asyncio.gather(saving, return_exceptions=True)  # a thread goes on by itself
                raise


def _from_afar(peer: PeerAddress, session: Session) -> Address | None:
    """An address as its teller means it, from here: a scope is a matter of one machine, and so is
    loopback."""
    host = peer.host
    if not session.local:
        if is_loopback(host):
            return None
        host = host.partition("%")[0]
    return host, peer.port
