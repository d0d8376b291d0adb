"""Whom this device trusts: ``home/identity/trust.json``, shared by all processes of a home.

May import ``errors`` and this package. Blocking, but quick: reads where the file changed, writes
under a lock of the operating system. The node calls ``refresh`` about every second, so that what a
command changed (``edgellm forget``) counts in the node too.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.errors import DeviceError, PairingError, UsageError
from edgellm.identity.device import Identity, identity_folder, load_identity
from edgellm.identity.files import locked, private_folder, read_private, unusable, write_private
from edgellm.identity.members import (
    MAX_ENCODED_BYTES,
    Member,
    Members,
    decode_cluster,
    encode_cluster,
    is_cluster_id,
)

FILE = "trust.json"

OnChange = Callable[[], None]
"""Called after a change, in the thread that made or noticed it; may ask, but not change."""

_Signature = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class _Trust:
    cluster_id: str = ""
    members: Members = field(default_factory=Members)


class TrustStore:
    """The members of this device's cluster. All methods may be called from any thread.

    Every method that changes something returns after it is on the disk; if it raises (DeviceError
    where the file cannot be used, PairingError for what is not accepted), nothing changed.
    """

    def __init__(self, home: Path, identity: Identity | None = None) -> None:
        """Raises DeviceError for a home that cannot be used, and for a damaged file."""
        self.identity = identity if identity is not None else load_identity(home)
        self._folder = identity_folder(home)
        self._path = self._folder / FILE
        private_folder(self._folder)
        self._listeners: list[OnChange] = []
        self._changing = threading.Lock()
        self._signature: _Signature = None
        self._trust = _Trust()
        self.refresh()

    # ------------------------------------------------------------------------------------ asking

    @property
    def cluster_id(self) -> str:
        """32 lower-case hex digits; empty while this device belongs to no cluster."""
        return self._trust.cluster_id

    @property
    def members(self) -> Members:
        """All records, this device's and the forgotten ones too."""
        return self._trust.members

    @property
    def others(self) -> tuple[Member, ...]:
        """Who else belongs to the cluster now."""
        own = self.identity.device_id
        return tuple(m for m in self._trust.members.active if m.device_id != own)

    @property
    def settled(self) -> bool:
        """Whether it belongs to a cluster with others in it, so that it may not join another."""
        return _settled(self._trust, self.identity.device_id)

    @property
    def expelled(self) -> bool:
        """Whether another member has forgotten this device, and word of it came here."""
        own = self._trust.members.get(self.identity.device_id)
        return own is not None and own.forgotten

    def trusted(self, device_id: str) -> bool:
        """Whether to talk to this device. It always trusts itself: its commands share its key."""
        return device_id == self.identity.device_id or self._trust.members.trusted(device_id)

    def certificates(self) -> dict[str, bytes]:
        """Of every device that is trusted now, this one's too: device id -> certificate (DER)."""
        own = self.identity
        found = {m.device_id: m.certificate for m in self._trust.members.active}
        return {**found, own.device_id: own.certificate}

    # ---------------------------------------------------------------------------------- changing

    def found(self, name: str) -> str:
        """The cluster's id; without a cluster, begin one that has only this device, called so."""

        def change(now: _Trust) -> _Trust:
            if now.cluster_id:
                return now
            me = self.identity
            members = Members().admit(me.device_id, name, me.certificate, by=me.device_id)
            return _Trust(secrets.token_hex(16), members)

        self._change(change)
        return self.cluster_id

    def add(self, device_id: str, name: str, certificate: bytes, *, above: int = 0) -> Member:
        """Let a device in that proved itself, also one that is known or was forgotten.

        ``above``: the version that the device itself had of its record, if any. Raises
        PairingError for a bad certificate, a full cluster, or where there is no cluster yet.
        """

        def change(now: _Trust) -> _Trust:
            if not now.cluster_id:
                raise PairingError("this device belongs to no cluster that another could join.")
            own = self.identity.device_id
            admitted = now.members.admit(device_id, name, certificate, by=own, above=above)
            return _Trust(now.cluster_id, admitted)

        trust = self._change(change)
        added = trust.members.get(device_id)
        if added is None:
            raise PairingError(f"device {device_id[:8]} was not let in.")
        return added

    def merge(self, records: Iterable[Member]) -> bool:
        """Take over what another member knows; whether anything changed."""
        offered = tuple(records)

        def change(now: _Trust) -> _Trust:
            if not now.cluster_id:
                raise PairingError("this device belongs to no cluster.")
            return _Trust(now.cluster_id, now.members.merge(offered))

        if change(self._trust) == self._trust:
            return False  # the usual case: no lock, no disk
        before = self._trust
        return self._change(change) != before

    def forget(self, device_id: str) -> Member:
        """Put a device out; its tombstone. Raises UsageError for an unknown one, or this one."""

        def change(now: _Trust) -> _Trust:
            if device_id not in now.members:
                raise UsageError(f"device {device_id[:8]} does not belong to this cluster.")
            own = self.identity.device_id
            return _Trust(now.cluster_id, now.members.forget(device_id, by=own))

        if device_id == self.identity.device_id:
            raise UsageError(
                "a device cannot forget itself.", hint="Forget it on another device of the cluster."
            )
        tombstone = self._change(change).members.get(device_id)
        if tombstone is None:
            raise UsageError(f"device {device_id[:8]} does not belong to this cluster.")
        return tombstone

    def adopt(self, cluster_id: str, members: Members, *, introducer: str = "") -> None:
        """Join the cluster of a device that we paired with: its ``pairing.Joined``, whole.

        Our own cluster's records stay if it is the same cluster. ``introducer`` is trusted
        afterwards even if it was forgotten here, as a person just paired with it. Raises
        PairingError if this device belongs to another cluster with others in it.
        """
        own = self.identity.device_id

        def change(now: _Trust) -> _Trust:
            if not is_cluster_id(cluster_id) or not members.trusted(own):
                raise PairingError("the cluster offered does not have this device in it.")
            if now.cluster_id == cluster_id:
                merged = now.members.merge(members)
            elif _settled(now, own):
                raise PairingError("this device already belongs to another cluster.")
            else:
                merged = members
            for device_id in filter(None, (own, introducer)):
                told = members.get(device_id)
                if told is not None and not told.forgotten and not merged.trusted(device_id):
                    merged = merged.admit(device_id, told.name, told.certificate, by=own)
            return _Trust(cluster_id, merged)

        self._change(change)

    # ----------------------------------------------------------------------------------- keeping

    def refresh(self) -> bool:
        """Re-read the file if another process changed it; whether it did. One ``stat`` if not.

        Raises DeviceError for a damaged file; what was known before stays in force.
        """
        if self._signature is not None and self._signature == self._sign():
            return False
        with self._changing:
            before = self._trust
            self._read()
            changed = self._trust != before
        if changed:
            self._tell()
        return changed

    def on_change(self, listener: OnChange) -> Callable[[], None]:
        """Call ``listener`` after each change; returns what takes it off again."""
        self._listeners.append(listener)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return remove

    def _change(self, change: Callable[[_Trust], _Trust]) -> _Trust:
        with self._changing, locked(self._folder):
            before = self._trust
            self._read()  # always: another process may have changed it a moment ago
            after = change(self._trust)
            if after != self._trust:
                write_private(self._path, encode_cluster(after.cluster_id, after.members))
                self._trust = after
                self._signature = self._sign()
        if after != before:
            self._tell()
        return after

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _sign(self) -> _Signature:
        try:
            seen = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(self._path, error) from error
        return (seen.st_mtime_ns, seen.st_ino, seen.st_size)

    def _read(self) -> None:
        signature = self._sign()  # before reading: a change in between is then noticed next time
        data = read_private(self._path, MAX_ENCODED_BYTES)
        if data is None:
            self._trust, self._signature = _Trust(), None
            return
        try:
            self._trust = _Trust(*decode_cluster(data))
        except PairingError as error:
            raise DeviceError(
                f"{self._path} is damaged: {error.message}",
                hint="Remove it and pair this device again.",
            ) from error
        self._signature = signature


def _settled(trust: _Trust, own: str) -> bool:
    # Whom the others have forgotten may go where it likes.
    return trust.members.trusted(own) and len(trust.members.active) > 1
