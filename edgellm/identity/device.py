"""This device's identity: a key that never leaves it, and the certificate that others pin.

May import ``errors`` and this package's ``certificates`` and ``files``. Blocking, but quick.
In ``home/identity`` (0700): ``key.pem`` (0600), ``certificate.pem``, ``boot``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgellm.errors import DeviceError, PairingError
from edgellm.identity.certificates import (
    MAX_CERTIFICATE_BYTES,
    MAX_KEY_BYTES,
    belongs_together,
    certificate_from_pem,
    certificate_of_key,
    certificate_to_pem,
    check_certificate,
    device_id_of,
    is_device_id,
    make_key_and_certificate,
)
from edgellm.identity.files import locked, private_folder, read_private, write_private

__all__ = [
    "MAX_CERTIFICATE_BYTES",
    "Identity",
    "certificate_path",
    "check_certificate",
    "device_id_of",
    "identity_folder",
    "is_device_id",
    "key_path",
    "load_identity",
    "make_identity",
    "next_boot",
    "save_identity",
]

_MAX_PEM_BYTES = 2 * MAX_CERTIFICATE_BYTES
_MAX_BOOT_BYTES = 32
MAX_BOOT = (1 << 53) - 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this device is. ``key`` is secret, and not in the repr."""

    device_id: str
    """SHA-256 of the certificate, 64 lower-case hex digits."""
    certificate: bytes
    """DER."""
    key: bytes = field(repr=False)
    """PEM, unencrypted PKCS #8."""


def identity_folder(home: Path) -> Path:
    return home / "identity"


def key_path(home: Path) -> Path:
    """Where ``load_identity`` keeps the key: what ``ssl.SSLContext.load_cert_chain`` wants."""
    return identity_folder(home) / "key.pem"


def certificate_path(home: Path) -> Path:
    return identity_folder(home) / "certificate.pem"


def make_identity() -> Identity:
    """A new device that no file knows yet."""
    key, certificate = make_key_and_certificate()
    return Identity(device_id_of(certificate), certificate, key)


def save_identity(home: Path, identity: Identity) -> None:
    """Make ``home`` that device's; DeviceError if it already is another's, or cannot be written."""
    folder = identity_folder(home)
    private_folder(folder)
    with locked(folder):
        if _read(home) not in (None, identity):
            raise DeviceError(f"{folder} already holds another device's identity.")
        _write(home, identity)


def load_identity(home: Path) -> Identity:
    """This home's identity, made on first use.

    Raises DeviceError where the home cannot be used, where the key is open to other users, and
    where key or certificate is damaged: a device never becomes another one silently.
    """
    folder = identity_folder(home)
    private_folder(folder)
    with locked(folder):  # two commands may be the first of a home at once
        found = _read(home)
        if found is None:
            found = make_identity()
            _write(home, found)
    return found


def next_boot(home: Path) -> int:
    """Count one more start of this device's node: 1, 2, ... Of two nodes with one id, the one with
    the higher number is the device, the other a leftover. Raises DeviceError like load_identity."""
    folder = identity_folder(home)
    private_folder(folder)
    path = folder / "boot"
    with locked(folder):
        data = read_private(path, _MAX_BOOT_BYTES)
        text = (data or b"0").decode("ascii", "replace").strip()
        if not (text.isascii() and text.isdecimal() and int(text) < MAX_BOOT):
            raise DeviceError(
                f"{path} is damaged.", hint="Write 1000000 into it, so that no start seems older."
            )
        boot = int(text) + 1
        write_private(path, b"%d\n" % boot)
    return boot


def _write(home: Path, identity: Identity) -> None:
    # The key first: a key without a certificate is a first use that was cut short, and heals. A
    # certificate without its key would be an identity that is lost.
    write_private(key_path(home), identity.key)
    write_private(certificate_path(home), certificate_to_pem(identity.certificate))


def _read(home: Path) -> Identity | None:
    key = read_private(key_path(home), MAX_KEY_BYTES, secret=True)
    pem = read_private(certificate_path(home), _MAX_PEM_BYTES)
    folder = identity_folder(home)
    hint = f"Put it back, or remove the folder {folder} and pair this device anew."
    if key is None and pem is None:
        return None
    if key is None:
        raise DeviceError(f"{key_path(home)} is missing.", hint=hint)
    try:
        certificate = certificate_of_key(key) if pem is None else certificate_from_pem(pem)
        if not belongs_together(key, certificate):
            raise PairingError("the certificate is of another key.")
    except PairingError as error:
        raise DeviceError(
            f"the identity in {folder} is damaged: {error.message}", hint=hint
        ) from error
    found = Identity(device_id_of(certificate), certificate, key)
    if pem is None:
        write_private(certificate_path(home), certificate_to_pem(certificate))
    return found
