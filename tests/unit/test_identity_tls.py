"""Contexts and the channel over them: who gets through a handshake, and who never does. No sockets:
two ends pass their bytes to each other.
"""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgellm.errors import NotPairedError
from edgellm.identity import Identity, TrustStore, device_id_of, make_identity
from edgellm.identity.tls import Credentials
from edgellm.transport.channel import MAX_HANDSHAKE_BYTES, Channel
from tests.circles import Circle, device

ALICE, BOB, EVE = device("alice"), device("bob"), device("eve")


def joined(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[Channel, Channel]:
    """(server, client) after the handshake; raises what either end does."""
    near, far = Channel(server, server_side=True), Channel(client, server_side=False)
    far.receive(b"")
    for _ in range(4):
        near.receive(far.outgoing())
        far.receive(near.outgoing())
    assert near.shaken
    assert far.shaken
    return near, far


def paired() -> tuple[Channel, Channel]:
    alice, bob = Circle(ALICE, BOB).credentials, Circle(BOB, ALICE).credentials
    return joined(alice.server_context(), bob.client_context())


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    *,
    issuer: str = "",
    signer: ec.EllipticCurvePrivateKey | None = None,
    ca: bool = False,
    years: tuple[int, int] = (1970, 9999),
) -> Identity:
    """A certificate as no device of ours makes it."""

    def called(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    first, last = years
    made = (
        x509.CertificateBuilder()
        .subject_name(called(name))
        .issuer_name(called(issuer or name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(first, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(last, 12, 31, tzinfo=datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(signer or key, hashes.SHA256())
    )
    der = made.public_bytes(serialization.Encoding.DER)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Identity(device_id_of(der), der, pem)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_paired_devices_know_each_other() -> None:
    alice, bob = Circle(ALICE, BOB).credentials, Circle(BOB, ALICE).credentials
    near, far = joined(alice.server_context(), bob.client_context())
    assert alice.peer_of(near.connection) == BOB.device_id
    assert bob.peer_of(far.connection) == ALICE.device_id
    assert near.connection.version() == far.connection.version() == "TLSv1.3"


def test_a_device_trusts_itself() -> None:
    alice = Circle(ALICE).credentials
    near, _ = joined(alice.server_context(), alice.client_context())
    assert alice.peer_of(near.connection) == ALICE.device_id


def test_a_trust_store_says_who_counts(tmp_path: Path) -> None:
    stores = TrustStore(tmp_path / "a", ALICE), TrustStore(tmp_path / "b", BOB)
    alice, bob = (Credentials(each.identity, each.certificates) for each in stores)
    stores[0].found("alice")
    stores[0].add(BOB.device_id, "bob", BOB.certificate)
    stores[1].adopt(stores[0].cluster_id, stores[0].members)
    near, _ = joined(alice.server_context(), bob.client_context())
    stores[0].forget(BOB.device_id)
    with pytest.raises(NotPairedError):
        alice.peer_of(near.connection)
    with pytest.raises(ssl.SSLCertVerificationError):
        joined(alice.server_context(), bob.client_context())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_tls_1_3(version: ssl.TLSVersion) -> None:
    client = Circle(BOB, ALICE).credentials.client_context()
    client.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    client.maximum_version = version
    server = Circle(ALICE, BOB).credentials.server_context()
    if version is ssl.TLSVersion.TLSv1_3:
        joined(server, client)
    else:
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
            joined(server, client)


def test_a_stranger_is_refused_by_the_server() -> None:
    eve = Circle(EVE, ALICE).credentials
    with pytest.raises(ssl.SSLCertVerificationError):
        joined(Circle(ALICE, BOB).credentials.server_context(), eve.client_context())


def test_a_stranger_is_refused_by_the_client() -> None:
    eve = Circle(EVE, BOB).credentials
    with pytest.raises(ssl.SSLCertVerificationError):
        joined(eve.server_context(), Circle(BOB, ALICE).credentials.client_context())


def test_who_shows_no_certificate_is_refused() -> None:
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
        joined(Circle(ALICE, BOB).credentials.server_context(), nobody)


def test_an_impostor_of_the_same_name_is_refused() -> None:
    subject = x509.load_der_x509_certificate(BOB.certificate).subject
    name = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    impostor = Circle(certificate(name, new_key()), ALICE).credentials
    with pytest.raises(ssl.SSLCertVerificationError):
        joined(Circle(ALICE, BOB).credentials.server_context(), impostor.client_context())


@pytest.mark.parametrize("ca", [False, True])
def test_a_certificate_that_a_paired_device_mints_is_refused(ca: bool, tmp_path: Path) -> None:
    key, minted_key = new_key(), new_key()
    mint = certificate("mint", key, ca=ca)
    minted = certificate("minted", minted_key, issuer="mint", signer=key)
    chain = tmp_path / "chain.pem"
    shown = (ssl.DER_cert_to_PEM_cert(each.certificate).encode() for each in (minted, mint))
    chain.write_bytes(b"".join(shown) + minted.key)
    client = Circle(minted, ALICE).credentials.client_context()
    client.load_cert_chain(chain)
    alice = Circle(ALICE, mint).credentials
    if not ca:
        with pytest.raises(ssl.SSLCertVerificationError):
            joined(alice.server_context(), client)
        return
    # OpenSSL takes it: an authority among the anchors may sign. Our look at the leaf does not.
    near, _ = joined(alice.server_context(), client)
    with pytest.raises(NotPairedError, match="does not belong"):
        alice.peer_of(near.connection)


def test_a_forgotten_device_cannot_resume_an_old_session() -> None:
    circle = Circle(ALICE, BOB)
    server, client = circle.credentials.server_context(), Circle(BOB, ALICE).credentials
    context = client.client_context()
    near, far = joined(server, context)
    near.send([b"what comes after the handshake, tickets too"])
    assert far.receive(near.outgoing()).startswith(b"what")
    old = far.connection.session
    assert old is None or not old.has_ticket
    circle.forget(BOB)
    # Also with the very context of then, should somebody have kept it: no shorter handshake.
    for now in (server, circle.credentials.server_context()):
        again = Channel(context, server_side=False)
        again.connection.session = old
        other = Channel(now, server_side=True)
        again.receive(b"")
        try:
            for _ in range(4):
                other.receive(again.outgoing())
                again.receive(other.outgoing())
        except ssl.SSLCertVerificationError:
            continue
        assert not other.connection.session_reused
        with pytest.raises(NotPairedError):
            circle.credentials.peer_of(other.connection)


def test_contexts_follow_trust_and_are_kept_while_it_stays() -> None:
    circle = Circle(ALICE, BOB)
    before = circle.credentials.server_context(), circle.credentials.client_context()
    assert circle.credentials.server_context() is before[0]
    circle.trusted = dict(circle.trusted)  # the same, said anew
    assert circle.credentials.server_context() is before[0]
    circle.trusted |= {EVE.device_id: EVE.certificate}
    assert circle.credentials.server_context() is not before[0]
    assert circle.credentials.client_context() is not before[1]
    joined(circle.credentials.server_context(), Circle(EVE, ALICE).credentials.client_context())


def test_a_whole_cluster_is_trusted() -> None:
    crowd = [make_identity() for _ in range(40)]
    alice = Circle(ALICE, *crowd).credentials
    last = Circle(crowd[-1], ALICE).credentials
    near, _ = joined(alice.server_context(), last.client_context())
    assert alice.peer_of(near.connection) == crowd[-1].device_id


def test_an_anchor_that_openssl_cannot_read_locks_out_nobody_else() -> None:
    circle = Circle(ALICE, BOB)
    circle.trusted |= {"f" * 64: b"no certificate"}
    joined(circle.credentials.server_context(), Circle(BOB, ALICE).credentials.client_context())


@pytest.mark.parametrize("years", [(1970, 1990), (9000, 9999)])
def test_a_wrong_clock_has_no_effect(years: tuple[int, int]) -> None:
    # The other way round: certificates that our right clock would refuse.
    odd = certificate("odd", new_key(), years=years)
    alice = Circle(ALICE, odd).credentials
    near, _ = joined(alice.server_context(), Circle(odd, ALICE).credentials.client_context())
    assert alice.peer_of(near.connection) == odd.device_id


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="lists no open files")
def test_no_file_stays_open() -> None:
    before = sorted(Path("/dev/fd").iterdir())
    for _ in range(3):
        Circle(ALICE, BOB).credentials.server_context()
    assert sorted(Path("/dev/fd").iterdir()) == before


# --- the channel ------------------------------------------------------------------------


def test_bytes_go_both_ways_however_they_are_cut() -> None:
    near, far = paired()
    data = bytes(range(256)) * 300
    near.send([data[:10], b"", memoryview(data)[10:50_000], bytearray(data[50_000:])])
    encrypted = near.outgoing()
    assert data[:64] not in encrypted
    got = b"".join(far.receive(encrypted[at : at + 977]) for at in range(0, len(encrypted), 977))
    assert got == data
    far.send([b"back"])
    assert near.receive(far.outgoing()) == b"back"


def test_an_end_is_told_after_what_came_before_it() -> None:
    near, far = paired()
    near.send([b"last words"])
    near.end()
    assert far.receive(near.outgoing()) == b"last words"
    assert far.ended
    assert not near.ended


def test_ending_while_the_peer_still_talks_is_no_error() -> None:
    near, far = paired()
    far.send([b"unread"])
    near.receive(far.outgoing()[:5])
    near.end()
    assert near.outgoing()


def test_a_changed_byte_is_noticed() -> None:
    near, far = paired()
    near.send([b"x" * 100])
    encrypted = bytearray(near.outgoing())
    encrypted[50] ^= 1
    with pytest.raises(ssl.SSLError):
        far.receive(bytes(encrypted))


def test_a_handshake_is_bounded() -> None:
    channel = Channel(Circle(ALICE, BOB).credentials.server_context(), server_side=True)
    # A handshake message that claims to be longer than any, in well-formed records.
    hello = b"\x01" + (100_000).to_bytes(3, "big")
    with pytest.raises(ssl.SSLError):
        for _ in range(2 * MAX_HANDSHAKE_BYTES // 1024):
            body, hello = hello + bytes(1024 - len(hello)), b""
            channel.receive(b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body)
