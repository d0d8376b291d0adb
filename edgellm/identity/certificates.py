"""Device keys and certificates: how they are made, and what is accepted of others. No files here.

May import only ``errors`` of edgellm. Certificates come from strangers: everything about one is
checked before it can become an anchor of trust, and whatever is wrong with it is a PairingError.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import hmac
import re

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgellm.errors import PairingError

MAX_CERTIFICATE_BYTES = 2048
MAX_KEY_BYTES = 4096
_DEVICE_ID = re.compile(r"[0-9a-f]{64}")
# A device without a clock battery wakes up in 1970 or in the year of its firmware: a certificate
# that is valid for ever takes the clock out of the question who is trusted.
_NOT_BEFORE = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_CURVE = ec.SECP256R1()
_REMEMBERED = 512  # twice the members of a cluster: each new session introduces all of them again


def is_device_id(text: str) -> bool:
    return _DEVICE_ID.fullmatch(text) is not None


def device_id_of(certificate: bytes) -> str:
    """The id of the device with this certificate (DER): its SHA-256, 64 lower-case hex digits."""
    return hashlib.sha256(certificate).hexdigest()


def make_key_and_certificate() -> tuple[bytes, bytes]:
    """A new P-256 key (unencrypted PKCS #8, PEM) and its self-signed certificate (DER)."""
    key = ec.generate_private_key(_CURVE)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem, certificate_of_key(pem)


def certificate_of_key(key: bytes) -> bytes:
    """A self-signed certificate (DER) of a key in PEM; each call makes another one.

    Raises PairingError for what is no P-256 key.
    """
    private = _private_key(key)
    public = private.public_key()
    # A name of its own for each key: TLS looks anchors up by name, and equal names would make it
    # try every member of the cluster.
    fingerprint = x509.SubjectKeyIdentifier.from_public_key(public)
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"edgellm {fingerprint.digest.hex()}")]
    )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        # No authority: a paired device must not be able to mint further ones.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_signing_only(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(fingerprint, critical=False)
        .sign(private, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.DER)


@functools.lru_cache(maxsize=_REMEMBERED)
def check_certificate(certificate: bytes) -> None:
    """Raise PairingError unless this is a certificate as devices make them.

    DER of at most 2048 bytes and nothing after it; a P-256 key; signed by itself with SHA-256;
    ``CA:FALSE``. Its dates are not looked at, here or anywhere.
    """
    if not 0 < len(certificate) <= MAX_CERTIFICATE_BYTES:
        raise _unusable(f"it has {len(certificate)} bytes")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        public = parsed.public_key()
        basic = parsed.extensions.get_extension_for_class(x509.BasicConstraints)
        if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != _CURVE.name:
            raise _unusable("its key is of another kind than P-256")
        if basic.value.ca or not basic.critical:
            raise _unusable("it could vouch for others")
        if parsed.issuer != parsed.subject:
            raise _unusable("another one vouches for it")
        if not isinstance(parsed.signature_hash_algorithm, hashes.SHA256):
            raise _unusable("its signature is of another kind")
        public.verify(parsed.signature, parsed.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise _unusable("its signature is wrong") from None
    # The parser warns of what it merely deplores: an error too, where warnings are errors.
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.ExtensionNotFound,
        x509.InvalidVersion,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
        Warning,
    ) as error:
        raise _unusable("it cannot be read") from error


def belongs_together(key: bytes, certificate: bytes) -> bool:
    """Whether the certificate (DER) is of this key (PEM). Raises PairingError for a bad key."""
    mine = _public_bytes(_private_key(key).public_key())
    public = x509.load_der_x509_certificate(certificate).public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    return hmac.compare_digest(mine, _public_bytes(public))


def certificate_to_pem(certificate: bytes) -> bytes:
    """The same certificate, as files and OpenSSL have it."""
    return x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)


def certificate_from_pem(pem: bytes) -> bytes:
    """DER of the certificate in a file. Raises PairingError unless it is one to be used."""
    try:
        der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    except ValueError as error:
        raise _unusable("it cannot be read") from error
    check_certificate(der)
    return der


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PairingError("this device's key cannot be read.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVE.name:
        raise PairingError("this device's key is of another kind than P-256.")
    return key


def _public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )


def _signing_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _unusable(why: str) -> PairingError:
    return PairingError(f"a device's certificate cannot be used: {why}.")
