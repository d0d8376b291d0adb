"""Who belongs to a cluster: records that merge the same way in whatever order they arrive. Pure.

May import ``errors``, ``settings`` (what a name is) and this package's ``certificates``.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from edgellm.errors import PairingError
from edgellm.identity.certificates import check_certificate, device_id_of, is_device_id
from edgellm.settings import is_name

MAX_MEMBERS = 256
MAX_VERSION = (1 << 53) - 1
MAX_ENCODED_BYTES = 1 << 20
"""More than 256 members with certificates of 2048 bytes need as JSON."""
_CLUSTER_ID = re.compile(r"[0-9a-f]{32}")
_MAX_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Member:
    """One device that belongs to the cluster, or (``forgotten``) does no more.

    What does not fit together is refused by the constructor with PairingError: an id that is not
    the certificate's hash, a certificate that no device makes, a name nobody can type.
    """

    device_id: str
    name: str
    certificate: bytes
    """DER; may be empty where forgotten."""
    version: int = 1
    """Of two records of one device the higher version counts."""
    forgotten: bool = False
    introduced_by: str = ""
    """Device id of who let it in, or put it out; empty: itself."""

    def __post_init__(self) -> None:
        if not is_device_id(self.device_id):
            raise PairingError(f"{self.device_id[:80]!r} is no device id.")
        if not is_name(self.name):
            raise PairingError(f"{self.name[:80]!r} cannot be a device's name.")
        if not 1 <= self.version <= MAX_VERSION:
            raise PairingError(f"a member's version {self.version} is outside 1 to {MAX_VERSION}.")
        if self.introduced_by and not is_device_id(self.introduced_by):
            raise PairingError(f"{self.introduced_by[:80]!r} is no device id.")
        if self.forgotten and not self.certificate:
            return
        if device_id_of(self.certificate) != self.device_id:
            raise PairingError(
                f"device {self.device_id[:8]} has a certificate that is not its own."
            )
        check_certificate(self.certificate)

    @property
    def weight(self) -> tuple[int, bool, str, str, bytes]:
        """Of two records of one device the heavier counts. Version first; forgotten wins a tie, as
        trusting too little can be mended; the rest only makes all devices choose the same one."""
        return (self.version, self.forgotten, self.introduced_by, self.name, self.certificate)


class Members:
    """All records of a cluster, at most 256 with the forgotten ones; never changes.

    Iterates in the order of device ids. ``merge`` is commutative, associative and idempotent as
    long as the records fit in.
    """

    __slots__ = ("_by_id",)

    def __init__(self, records: Iterable[Member] = ()) -> None:
        found: dict[str, Member] = {}
        for record in records:
            known = found.get(record.device_id)
            if known is None or record.weight > known.weight:
                found[record.device_id] = record
            if len(found) > MAX_MEMBERS:
                raise PairingError(
                    f"a cluster has at most {MAX_MEMBERS} devices, forgotten ones included.",
                    hint="Begin a new cluster.",
                )
        self._by_id = dict(sorted(found.items()))

    def __iter__(self) -> Iterator[Member]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, device_id: object) -> bool:
        return device_id in self._by_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Members) and self._by_id == other._by_id

    def __hash__(self) -> int:
        return hash(tuple(self._by_id.values()))

    def __repr__(self) -> str:
        out = [f"{'-' if m.forgotten else ''}{m.name}@{m.version}" for m in self]
        return f"Members({', '.join(out)})"

    def get(self, device_id: str) -> Member | None:
        """The record, forgotten or not."""
        return self._by_id.get(device_id)

    @property
    def active(self) -> tuple[Member, ...]:
        """Who belongs to the cluster now."""
        return tuple(m for m in self if not m.forgotten)

    def trusted(self, device_id: str) -> bool:
        found = self._by_id.get(device_id)
        return found is not None and not found.forgotten

    def merge(self, records: Iterable[Member]) -> Members:
        """With what another device knows. Raises PairingError, and keeps nothing of it, where that
        would be more than 256 records. Returns self where nothing changes."""
        merged = Members([*self, *records])
        return self if merged == self else merged

    def admit(
        self, device_id: str, name: str, certificate: bytes, *, by: str = "", above: int = 0
    ) -> Members:
        """Let a device in, also one that is known or was forgotten: its version becomes higher
        than what is known here, and than ``above``, which the device itself knew.

        Raises PairingError for a bad certificate or name, or a full cluster.
        """
        known = self._by_id.get(device_id)
        version = max(known.version if known else 0, above) + 1
        return self.merge([Member(device_id, name, certificate, version, False, by)])

    def forget(self, device_id: str, *, by: str = "") -> Members:
        """Put a device out. Unknown ones raise PairingError; forgotten ones change nothing."""
        known = self._by_id.get(device_id)
        if known is None:
            raise PairingError(f"device {device_id[:8]} does not belong to this cluster.")
        if known.forgotten:
            return self
        # At the highest version too: the tie goes to the tombstone.
        version = min(known.version + 1, MAX_VERSION)
        return self.merge([replace(known, version=version, forgotten=True, introduced_by=by)])


def is_cluster_id(text: str) -> bool:
    return _CLUSTER_ID.fullmatch(text) is not None


def encode_cluster(cluster_id: str, members: Members) -> bytes:
    """A cluster as JSON: what stands in the trust store, and what a new device is sent."""
    records = [
        {
            "id": m.device_id,
            "name": m.name,
            "certificate": base64.b64encode(m.certificate).decode("ascii"),
            "version": m.version,
            "forgotten": m.forgotten,
            "introduced_by": m.introduced_by,
        }
        for m in members
    ]
    content = {"format": 1, "cluster_id": cluster_id, "members": records}
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def decode_cluster(data: bytes) -> tuple[str, Members]:
    """What ``encode_cluster`` wrote. Raises PairingError for anything else, all or nothing."""
    if len(data) > MAX_ENCODED_BYTES:
        raise PairingError(f"a list of members has more than {MAX_ENCODED_BYTES} bytes.")
    try:
        content = json.loads(data, parse_int=_short_integer)
    # Absurd nesting and absurd numbers raise too, each in its own way.
    except (ValueError, RecursionError) as error:
        raise PairingError("a list of members cannot be read.") from error
    if not isinstance(content, dict) or content.get("format") != 1:
        raise PairingError("a list of members has an unknown format.")
    cluster_id, records = content.get("cluster_id"), content.get("members")
    if not isinstance(cluster_id, str) or not is_cluster_id(cluster_id):
        raise PairingError("a list of members names no cluster.")
    if not isinstance(records, list) or len(records) > MAX_MEMBERS:
        raise PairingError(f"a list of members has none, or more than {MAX_MEMBERS}.")
    members = Members(_decode_member(each) for each in records)
    if len(members) != len(records):
        raise PairingError("a list of members names a device twice.")
    return cluster_id, members


def _decode_member(record: Any) -> Member:
    fields = record if isinstance(record, dict) else {}
    texts = [fields.get(key) for key in ("id", "name", "certificate", "introduced_by")]
    version, forgotten = fields.get("version"), fields.get("forgotten")
    if (
        not all(isinstance(each, str) for each in texts)
        or type(version) is not int
        or type(forgotten) is not bool
    ):
        raise PairingError("a list of members has a record with missing or wrong fields.")
    device_id, name, encoded, introduced_by = texts
    try:
        certificate = base64.b64decode(str(encoded), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PairingError("a list of members has a certificate that cannot be read.") from error
    return Member(str(device_id), str(name), certificate, version, forgotten, str(introduced_by))


def _short_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("a number of absurd length")
    return int(text)
