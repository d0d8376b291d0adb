"""Who may talk to us, as TLS contexts: mutual TLS 1.3 with pinned certificates.

No sockets and no policy of its own here: ``trusted`` says at any moment which devices count. A
certificate is a trust anchor only for itself. OpenSSL refuses any other chain because pairing
takes no certificate that may sign others (``CA:FALSE``); ``peer_of`` does not rely on that: after
every handshake it looks up the very certificate that the peer showed.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from edgellm.errors import NotPairedError
from edgellm.identity.device import Identity, device_id_of

Trusted: TypeAlias = Callable[[], Mapping[str, bytes]]
"""The devices that are trusted now: device id (64 hex digits) -> certificate (DER). For example
``TrustStore.certificates``."""

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which ``ssl`` has no name for: a wrong clock locks nobody
out, and trust ends by being withdrawn, not by a date."""


class Credentials:
    """What a device proves itself with, and whom it believes. ``trusted`` is asked at every
    connection, so that a device which is forgotten gets no further one."""

    def __init__(self, identity: Identity, trusted: Trusted) -> None:
        self._identity = identity
        self._trusted = trusted
        self._anchors: dict[str, bytes] = {}
        self._contexts: dict[int, ssl.SSLContext] = {}

    @property
    def device_id(self) -> str:
        return self._identity.device_id

    def server_context(self) -> ssl.SSLContext:
        """For accepted connections, as of now. Do not keep it: the next may trust others."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext:
        """For dialed connections; as ``server_context``."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def peer_of(self, connection: ssl.SSLObject | ssl.SSLSocket) -> str:
        """The device id of the peer after a handshake.

        Raises NotPairedError for a certificate that is not exactly the one of a trusted device.
        """
        certificate = connection.getpeercert(binary_form=True)
        if certificate is None:
            raise NotPairedError("the peer showed no certificate.")
        device_id = device_id_of(certificate)
        if self._believed().get(device_id) != certificate:
            raise NotPairedError(f"device {device_id[:8]} does not belong to this cluster.")
        return device_id

    def _believed(self) -> dict[str, bytes]:
        # Our own counts too: the commands of one home talk to its node as the same device.
        return {**self._trusted(), self._identity.device_id: self._identity.certificate}

    def _context(self, protocol: int) -> ssl.SSLContext:
        believed = self._believed()
        if believed != self._anchors:
            self._anchors = believed
            self._contexts.clear()
        if protocol not in self._contexts:
            self._contexts[protocol] = _make_context(protocol, self._identity, believed)
        return self._contexts[protocol]


def _make_context(
    protocol: int, identity: Identity, anchors: Mapping[str, bytes]
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # addresses of devices change; what counts is the certificate
    context.verify_mode = ssl.CERT_REQUIRED
    # An anchor need not be an authority.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    for each in anchors.values():
        # One that this OpenSSL cannot read shall lock out nobody but its device.
        with contextlib.suppress(ssl.SSLError, ValueError):
            context.load_verify_locations(cadata=each)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # A ticket would let a device come back by a former handshake, without its certificate.
        context.num_tickets = 0
    certificate = ssl.DER_cert_to_PEM_cert(identity.certificate).encode()
    with _readable_at(certificate) as certificate_path, _readable_at(identity.key) as key_path:
        context.load_cert_chain(certificate_path, key_path)
    return context


@contextlib.contextmanager
def _readable_at(content: bytes) -> Iterator[str]:
    """A path that gives ``content`` once: ``ssl`` takes keys only from files, and a pipe, other
    than a temporary file, leaves nothing on a disk whenever this process may be killed."""
    reader, writer = os.pipe()
    try:
        try:
            os.write(writer, content)  # less than a pipe holds, so this never waits
        finally:
            os.close(writer)
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)
