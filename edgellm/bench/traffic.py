"""Bytes that a process's TCP connections have carried, from the kernel's own counters. Linux only.

Counting this way costs the connection nothing, so the run that is counted is the one that is timed.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_ACKED_AND_RECEIVED = struct.Struct("=120xQQ")
"""``tcpi_bytes_acked`` and ``tcpi_bytes_received`` in linux/tcp.h's ``tcp_info``, 4.1 on."""
_OWN_DESCRIPTORS = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Payload bytes, without the headers of TCP and IP."""

    sent: int
    received: int

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.received - before.received)


def connections_to(ports: Collection[int]) -> list[socket.socket]:
    """This process's own TCP connections to remote ``ports``, whoever opened them; empty where the
    system does not tell. The caller closes them, which leaves the opener's descriptors open."""
    if not ports or not sys.platform.startswith("linux"):
        return []
    found: list[socket.socket] = []
    for entry in list(_OWN_DESCRIPTORS.iterdir()):
        # The folder's own descriptor was among them: its number may be that of a copy by now.
        if int(entry.name) in {connection.fileno() for connection in found}:
            continue
        try:
            copy = os.dup(int(entry.name))
        except OSError:  # closed since
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        if _remote_port(connection) in ports:
            found.append(connection)
        else:
            connection.close()
    return found


def traffic(connections: Collection[socket.socket]) -> Traffic:
    """What the connections have carried so far; of what was sent, what the other side has."""
    sent = received = 0
    for connection in connections:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AND_RECEIVED.size)
        acked, came = _ACKED_AND_RECEIVED.unpack(info)
        sent += acked
        received += came
    return Traffic(sent, received)


def _remote_port(connection: socket.socket) -> int:
    try:
        address = connection.getpeername()
    except OSError:  # it listens, or is closed
        return 0
    return int(address[1]) if isinstance(address, tuple) else 0
