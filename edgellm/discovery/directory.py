"""The devices of which a node knows, and when to try which again: every decision, no effect. Pure.

``now`` is any clock that only goes forward, in seconds. Sightings make devices known; ``due`` says
whom to try; what came of it is told by ``reached``, ``failed`` and ``lost``. Nobody is forgotten
for silence, only for lack of room.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edgellm.discovery.addresses import Address
from edgellm.discovery.base import MAX_ADDRESSES, MAX_DEVICES, How, Sighting

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
STEADY_S = 5.0
"""A connection that lasted for so long was a good one."""
LEFT_TRIES = 4
"""Who left on purpose is tried as rarely as who failed so often: after 4 s, 8 s, ... 30 s."""
MAX_TARGETS = 64
"""Addresses that were told without saying which device is there."""
TRIES_BEFORE_WORDS = 2
"""A device that was seen and not reached so often in a row is worth telling people about."""


class State(enum.StrEnum):
    """Of a neighbour."""

    TRYING = "trying"
    """Seen, and not reached yet."""
    REACHED = "reached"
    LOST = "lost"
    """It was reached before, and is being tried again."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Whom to try now. An empty ``device_id`` takes whoever is there."""

    device_id: str
    addresses: tuple[Address, ...]


class Verdict(enum.Enum):
    """What a greeting means."""

    NEW = "new"
    """A device that was not reached before: keep the connection."""
    DOUBLE = "double"
    """It is connected already."""
    OURSELVES = "ourselves"
    OTHER = "other"
    """Not the device that was looked for; it is now known as who it is."""


@dataclass(frozen=True, slots=True)
class Device:
    """What is known of one device."""

    device_id: str
    name: str
    addresses: tuple[Address, ...]
    state: State
    since: float
    """When it came to be in this state."""
    at: Address | None
    """Where it was reached, the last time."""


@dataclass(slots=True)
class _Retry:
    """When to try again: at once, then after 0.5 s, 1 s, ... 30 s, each shortened by chance."""

    at: float
    tries: int = 0
    under_way: bool = False
    told: bool = False
    """Whether people were told that it does not answer."""

    def begin(self) -> None:
        self.under_way = True
        self.tries += 1

    def later(self, now: float, chance: float) -> None:
        self.under_way = False
        self.at = now + retry_after(self.tries, chance)

    def soon(self, now: float) -> None:
        """There is news: try earlier than planned, but never all the time."""
        self.at = min(self.at, now + (FIRST_RETRY_S if self.tries else 0.0))


@dataclass(slots=True)
class _Record:
    device_id: str
    name: str
    seen: float
    since: float
    retry: _Retry
    addresses: list[Address] = field(default_factory=list)
    state: State = State.TRYING
    at: Address | None = None


@dataclass(slots=True)
class _Target:
    """A told address; ``device_id`` is who was there the last time."""

    address: Address
    retry: _Retry
    device_id: str = ""


def retry_after(tries: int, chance: float) -> float:
    """Seconds to wait after the ``tries``-th try in a row; ``chance`` is in [0, 1)."""
    longest = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(max(tries, 1) - 1, 16))
    return float(longest * (1.0 - chance / 2))


class Directory:
    """See the module. ``chance`` gives numbers in [0, 1)."""

    def __init__(self, me: str, chance: Callable[[], float]) -> None:
        self._me = me
        self._chance = chance
        self._records: dict[str, _Record] = {}
        self._targets: dict[Address, _Target] = {}

    def devices(self) -> tuple[Device, ...]:
        """All of them, in the order in which they came to be known."""
        return tuple(
            Device(r.device_id, r.name, tuple(r.addresses), r.state, r.since, r.at)
            for r in self._records.values()
        )

    # --- news -------------------------------------------------------------------------

    def saw(self, sighting: Sighting, now: float) -> None:
        """A device may be there."""
        if not sighting.device_id:
            for address in sighting.addresses:
                if len(self._targets) < MAX_TARGETS:
                    self._targets.setdefault(address, _Target(address, _Retry(now)))
            return
        if sighting.device_id == self._me:
            return
        record = self._record(sighting.device_id, sighting.name, now)
        if record is None:
            return
        news = set(sighting.addresses) - set(record.addresses)
        record.seen = now
        if record.state is not State.REACHED:
            record.name = sighting.name or record.name
        if sighting.how is How.GOSSIP:
            # What others say of a device counts less than what is known: it comes last.
            merged = [*record.addresses, *sighting.addresses]
        else:
            merged = [*sighting.addresses, *record.addresses]
        record.addresses = _most(merged, record.at)
        if news or sighting.how is How.MDNS:
            if news and sighting.how is not How.GOSSIP:
                record.retry.tries = min(record.retry.tries, 1)
            record.retry.soon(now)

    def _record(self, device_id: str, name: str, now: float) -> _Record | None:
        record = self._records.get(device_id)
        if record is None:
            if len(self._records) >= MAX_DEVICES and not self._make_room():
                return None
            record = self._records[device_id] = _Record(device_id, name, now, now, _Retry(now))
        return record

    def _make_room(self) -> bool:
        """Forget who was never reached, or else lost, and not seen for longest."""
        idle = [
            record
            for record in self._records.values()
            if record.state is not State.REACHED and not record.retry.under_way
        ]
        if not idle:
            return False
        oldest = min(idle, key=lambda record: (record.state is State.LOST, record.seen))
        del self._records[oldest.device_id]
        return True

    # --- trying -----------------------------------------------------------------------

    def due(self, now: float, most: int = MAX_DEVICES) -> list[Attempt]:
        """Whom to try now, ``most`` of them at most and those first that failed least; each counts
        as being tried until told otherwise."""
        waiting = [
            (record.retry, Attempt(record.device_id, tuple(record.addresses)))
            for record in self._records.values()
            if record.state is not State.REACHED and _is_due(record.retry, now)
        ]
        waiting += [
            (target.retry, Attempt("", (target.address,)))
            for target in self._targets.values()
            if not self._is_reached(target.device_id) and _is_due(target.retry, now)
        ]
        waiting.sort(key=lambda each: (each[0].tries, each[0].at))
        for retry, _ in waiting[:most]:
            retry.begin()
        return [attempt for _, attempt in waiting[:most]]

    def next_due(self) -> float | None:
        """When ``due`` will have something; None while it will not."""
        times = [
            record.retry.at
            for record in self._records.values()
            if record.state is not State.REACHED and not record.retry.under_way
        ]
        times += [
            target.retry.at
            for target in self._targets.values()
            if not target.retry.under_way and not self._is_reached(target.device_id)
        ]
        return min(times, default=None)

    def _is_reached(self, device_id: str) -> bool:
        record = self._records.get(device_id)
        return record is not None and record.state is State.REACHED

    def reached(
        self, attempt: Attempt, device_id: str, name: str, address: Address, now: float
    ) -> Verdict:
        """Somebody greeted at ``address``."""
        retry = self._retry_of(attempt)
        if device_id == self._me:
            if attempt.device_id:
                self._drop_address(attempt.device_id, address)
                self._later(retry, now)
            else:
                self._targets.pop(address, None)
            return Verdict.OURSELVES
        if attempt.device_id and attempt.device_id != device_id:
            self._drop_address(attempt.device_id, address)
            self._later(retry, now)
            self.saw(Sighting(device_id, name, (address,), How.GOSSIP), now)
            return Verdict.OTHER
        if retry is not None:
            retry.under_way = False
            retry.told, retry.at = False, now
        if not attempt.device_id and address in self._targets:
            self._targets[address].device_id = device_id
        record = self._record(device_id, name, now)
        if record is None or record.state is State.REACHED:
            return Verdict.DOUBLE
        record.name, record.at, record.seen = name, address, now
        record.addresses = _most([address, *record.addresses], None)
        record.state, record.since = State.REACHED, now
        record.retry.told = False
        return Verdict.NEW

    def failed(self, attempt: Attempt, now: float) -> bool:
        """Nobody answered. Whether it is time to tell people so: once, until it is reached."""
        retry = self._retry_of(attempt)
        if retry is None:
            return False
        self._later(retry, now)
        enough = retry.tries >= (TRIES_BEFORE_WORDS if attempt.device_id else 1)
        if retry.told or not enough:
            return False
        if attempt.device_id and self._records[attempt.device_id].at is not None:
            return False  # it was reached before: that it was lost has been said
        retry.told = True
        return True

    def lost(self, device_id: str, now: float, *, on_purpose: bool = False) -> None:
        """The connection to a reached device ended. It is tried again at once, but not where it
        said that it would leave, and not all the time where it hangs up on us again and again."""
        record = self._records.get(device_id)
        if record is None or record.state is not State.REACHED:
            return
        retry, steady = record.retry, now - record.since >= STEADY_S
        record.state, record.since = State.LOST, now
        retry.under_way = False
        if on_purpose:
            retry.tries = LEFT_TRIES
        elif steady:
            retry.tries = 0
        if retry.tries <= 1:
            retry.at = now + self._chance() * FIRST_RETRY_S / 2
        else:
            self._later(retry, now)
        for target in self._targets.values():
            if target.device_id == device_id:
                target.retry.tries = retry.tries
                target.retry.at = max(now + FIRST_RETRY_S, retry.at)

    def soon(self, device_id: str, now: float) -> None:
        """There is reason to believe that a device is there."""
        record = self._records.get(device_id)
        if record is not None and record.state is not State.REACHED:
            record.retry.tries = min(record.retry.tries, 1)
            record.retry.soon(now)

    def forget(self, device_id: str) -> None:
        """Look for it no more. An address that a person told is still tried."""
        self._records.pop(device_id, None)
        for target in self._targets.values():
            if target.device_id == device_id:
                target.device_id = ""

    def remembered(self) -> tuple[Sighting, ...]:
        """What to remember for the next start: who was ever reached, those at hand first."""
        ever = [record for record in self._records.values() if record.at is not None]
        ever.sort(key=lambda record: (record.state is not State.REACHED, -record.since))
        return tuple(
            Sighting(record.device_id, record.name, tuple(record.addresses), How.KNOWN)
            for record in ever
        )

    def _retry_of(self, attempt: Attempt) -> _Retry | None:
        if attempt.device_id:
            record = self._records.get(attempt.device_id)
            return None if record is None else record.retry
        target = self._targets.get(attempt.addresses[0])
        return None if target is None else target.retry

    def _later(self, retry: _Retry | None, now: float) -> None:
        if retry is not None:
            retry.later(now, self._chance())

    def _drop_address(self, device_id: str, address: Address) -> None:
        """Somebody else is at this address. Whoever claims it again has it tried again."""
        record = self._records.get(device_id)
        if record is not None and address in record.addresses:
            record.addresses.remove(address)


def _is_due(retry: _Retry, now: float) -> bool:
    return not retry.under_way and now >= retry.at


def _most(addresses: Iterable[Address], keep: Address | None) -> list[Address]:
    """The first of them, each once, and ``keep`` in any case."""
    once = list(dict.fromkeys(addresses))
    if keep is not None and keep in once[MAX_ADDRESSES:]:
        once.insert(MAX_ADDRESSES - 1, keep)
    return once[:MAX_ADDRESSES]
