"""A device's key and certificate: made once, private, never changed silently; what is accepted."""

from __future__ import annotations

import datetime
import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from edgellm.errors import DeviceError, PairingError
from edgellm.identity.device import (
    Identity,
    certificate_path,
    check_certificate,
    device_id_of,
    identity_folder,
    key_path,
    load_identity,
    make_identity,
    next_boot,
    save_identity,
)

Signer = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------------------------------- files


def test_an_identity_is_made_once(tmp_path: Path) -> None:
    first = load_identity(tmp_path / "home")
    assert load_identity(tmp_path / "home") == first
    assert load_identity(tmp_path / "other") != first
    assert first.device_id == device_id_of(first.certificate)
    assert b"PRIVATE KEY" in first.key
    assert "PRIVATE KEY" not in repr(first)


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)  # the rights must not hang on it
    try:
        load_identity(tmp_path)
    finally:
        os.umask(before)
    assert mode(identity_folder(tmp_path)) == 0o700
    assert mode(key_path(tmp_path)) == 0o600
    assert sorted(p.name for p in identity_folder(tmp_path).iterdir()) == [
        "certificate.pem",
        "key.pem",
        "lock",
    ]


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    identity_folder(tmp_path).mkdir(mode=0o755)
    load_identity(tmp_path)
    assert mode(identity_folder(tmp_path)) == 0o700


@pytest.mark.parametrize("rights", [0o640, 0o604, 0o644, 0o620, 0o666])
def test_a_key_that_others_may_have_read_is_refused(tmp_path: Path, rights: int) -> None:
    made = load_identity(tmp_path)
    key_path(tmp_path).chmod(rights)
    with pytest.raises(DeviceError, match="open to other users") as caught:
        load_identity(tmp_path)
    assert "chmod 600" in str(caught.value)
    key_path(tmp_path).chmod(0o600)  # as the hint says
    assert load_identity(tmp_path) == made


def test_a_certificate_that_others_may_write_is_refused(tmp_path: Path) -> None:
    load_identity(tmp_path)
    certificate_path(tmp_path).chmod(0o644)
    load_identity(tmp_path)  # to read is fine: it is public
    certificate_path(tmp_path).chmod(0o664)
    with pytest.raises(DeviceError, match="open to other users"):
        load_identity(tmp_path)


def test_a_first_use_that_was_cut_short_heals(tmp_path: Path) -> None:
    key = load_identity(tmp_path).key
    certificate_path(tmp_path).unlink()
    healed = load_identity(tmp_path)
    assert healed.key == key
    assert load_identity(tmp_path) == healed


def test_an_identity_is_never_replaced_silently(tmp_path: Path) -> None:
    load_identity(tmp_path)
    kept = key_path(tmp_path).read_bytes()
    key_path(tmp_path).unlink()
    with pytest.raises(DeviceError, match="missing"):
        load_identity(tmp_path)
    for damaged in (b"", kept[:-40], b"garbage", kept.replace(b"M", b"N"), make_identity().key):
        key_path(tmp_path).write_bytes(damaged)
        key_path(tmp_path).chmod(0o600)
        with pytest.raises(DeviceError, match="damaged"):
            load_identity(tmp_path)
    key_path(tmp_path).write_bytes(kept)
    for damaged in (b"", b"garbage", bytes(5000)):
        certificate_path(tmp_path).write_bytes(damaged)
        with pytest.raises(DeviceError, match="damaged"):
            load_identity(tmp_path)


def test_save_identity_keeps_what_is_there(tmp_path: Path) -> None:
    made = make_identity()
    save_identity(tmp_path, made)
    save_identity(tmp_path, made)
    assert load_identity(tmp_path) == made
    with pytest.raises(DeviceError, match="already"):
        save_identity(tmp_path, make_identity())
    assert load_identity(tmp_path) == made


def test_two_first_uses_at_once_agree(tmp_path: Path) -> None:
    found: list[Identity] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_identity(tmp_path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert len(set(found)) == 1


def test_a_home_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot be used") as caught:
        load_identity(tmp_path / "file")
    assert "--home" in str(caught.value)


def test_boots_are_counted(tmp_path: Path) -> None:
    assert [next_boot(tmp_path) for _ in range(3)] == [1, 2, 3]
    boot = identity_folder(tmp_path) / "boot"
    assert mode(boot) == 0o600
    for damaged in ("x", "-4", "9" * 20, "1" * 40, "²"):
        boot.write_text(damaged, encoding="utf-8")
        with pytest.raises(DeviceError):
            next_boot(tmp_path)
    boot.write_text("1000000")
    assert next_boot(tmp_path) == 1000001


# --------------------------------------------------------------------------------- certificates


def certificate(
    key: Signer | None = None,
    *,
    signer: Signer | None = None,
    ca: bool = False,
    constraints: bool = True,
    critical: bool = True,
    issuer: str = "x",
    digest: hashes.HashAlgorithm | None = None,
    from_year: int = 1970,
    until_year: int = 9999,
    padding: int = 0,
) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(from_year, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(until_year, 1, 2, tzinfo=datetime.UTC))
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=critical)
    if padding:
        name = x509.DNSName("a" * padding)
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    chosen = None if isinstance(key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    made = builder.sign(signer or key, chosen)  # type: ignore[arg-type]
    return made.public_bytes(serialization.Encoding.DER)


def test_certificates_as_devices_make_them_are_accepted() -> None:
    check_certificate(make_identity().certificate)
    check_certificate(certificate())  # so that the ones below are refused for what is wrong there


def test_the_clock_has_no_say() -> None:
    check_certificate(certificate(from_year=1970, until_year=1971))
    check_certificate(certificate(from_year=9998))
    parsed = x509.load_der_x509_certificate(make_identity().certificate)
    assert parsed.not_valid_before_utc.year == 1970
    assert parsed.not_valid_after_utc.year == 9999


def test_a_device_cannot_vouch_for_others() -> None:
    parsed = x509.load_der_x509_certificate(make_identity().certificate)
    basic = parsed.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not basic.value.ca
    assert basic.critical
    usage = parsed.extensions.get_extension_for_class(x509.KeyUsage)
    assert not usage.value.key_cert_sign


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lambda: certificate(ca=True), "vouch for others"),
        (lambda: certificate(constraints=False), "cannot be read"),
        (lambda: certificate(critical=False), "vouch for others"),
        (lambda: certificate(issuer="y"), "another one vouches"),
        (lambda: certificate(signer=ec.generate_private_key(ec.SECP256R1())), "signature is wrong"),
        (lambda: certificate(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (lambda: certificate(rsa.generate_private_key(65537, 1024)), "P-256"),
        (lambda: certificate(ed25519.Ed25519PrivateKey.generate()), "P-256"),
        (lambda: certificate(digest=hashes.SHA512()), "another kind"),
        (lambda: certificate(padding=3000), "bytes"),
        (lambda: certificate() + b"\0", "cannot be read"),
        (lambda: b"", "0 bytes"),
        (lambda: b"\x30\x82\xff\xff" + bytes(100), "cannot be read"),
    ],
)
def test_other_certificates_are_refused(bad: object, why: str) -> None:
    assert callable(bad)
    with pytest.raises(PairingError, match=why):
        check_certificate(bad())


def test_a_certificate_with_any_byte_changed_is_refused() -> None:
    good = make_identity().certificate
    check_certificate(good)
    for position in range(len(good)):
        changed = bytearray(good)
        changed[position] ^= 0x10
        with pytest.raises(PairingError):
            check_certificate(bytes(changed))
