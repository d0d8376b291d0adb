"""One end of a TLS connection, sans-IO: received bytes in, plain bytes out, and the other way.

No sockets, no event loop, no judgement: OpenSSL's errors (``ssl.SSLError``) go to the caller. After
any call, also one that raised, ``outgoing`` may have bytes for the peer: an alert is the only way
that it learns why it is refused.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterable

from edgellm.transport.base import Buffer

_RECORD_BYTES = 16 * 1024
"""The most that one TLS record holds, and so the most that one read returns."""
MAX_HANDSHAKE_BYTES = 32 * 1024
"""What a peer may send for a handshake; a device's takes about 1 KiB."""


class Channel:
    """See the module. A dialer calls ``receive(b"")`` to begin."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._handshake_bytes = 0
        self.connection = context.wrap_bio(self._incoming, self._outgoing, server_side)
        self.shaken = False
        """Whether the handshake is done, as far as this end can know: a dialer that the peer
        refuses learns that from its next read."""
        self.ended = False
        """Whether the peer said that it will send no more."""

    def receive(self, data: bytes) -> bytes:
        """The plain bytes in what arrived: none as long as the handshake goes on."""
        self._incoming.write(data)
        if not self.shaken:
            self._handshake_bytes += len(data)
            try:
                self.connection.do_handshake()
            except ssl.SSLWantReadError:
                if self._handshake_bytes > MAX_HANDSHAKE_BYTES:
                    raise ssl.SSLError("the handshake is too long") from None
                return b""
            self.shaken = True
        chunks: list[bytes] = []
        # OpenSSL takes one record at a time: when nothing is left here, nothing waits in it. To
        # ask it instead would cost an exception for every small frame.
        with contextlib.suppress(ssl.SSLWantReadError):
            while self._incoming.pending:
                chunk = self.connection.read(_RECORD_BYTES)
                if not chunk:
                    self.ended = True
                    break
                chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def send(self, buffers: Iterable[Buffer]) -> None:
        """Encrypt; each buffer begins a record."""
        for each in buffers:
            if len(each):
                self.connection.write(each)

    def end(self) -> None:
        """Say that no more will be sent."""
        # It then looks for the same from the peer, and complains of what it finds instead.
        with contextlib.suppress(ssl.SSLError):
            self.connection.unwrap()

    def outgoing(self) -> bytes:
        """What is to be sent to the peer."""
        return self._outgoing.read()
