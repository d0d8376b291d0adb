"""Frames: how one message lies on a byte stream. Sans-IO: no sockets, no clock, no messages.

This file knows lengths, kinds as bare numbers and the checksum; what the ``meta`` bytes mean
is the business of ``messages``. Bytes from a peer are either whole valid frames or a
``RemoteProtocolError``, never anything else, and no length is believed before it was checked.

Layout, little endian (see docs/protocol.md)::

    magic "eL" | version u8 | kind u8 | meta_len u32 | payload_len u32 | crc32 u32 | meta | payload

The checksum covers the first twelve header bytes, the meta and the payload.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias
from zlib import crc32

from edgellm.errors import LocalProtocolError, RemoteProtocolError

MAGIC = b"eL"
VERSION = 2
HEADER_BYTES = 16
MAX_META_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 1 << 30
"""No payload limit may be set higher: a plan that wants more is wrong."""

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEAD = struct.Struct("<2sBBII")
_HEADER = struct.Struct("<2sBBIII")
_CRC = struct.Struct("<I")
_KINDS = 256


@dataclass(frozen=True, slots=True)
class Frame:
    """One checked frame. ``raw`` is the whole of it, to be forwarded without encoding again."""

    kind: int
    meta: bytes
    payload: memoryview
    """A view into ``raw``: the frame lives as long as the payload is used."""
    raw: bytes


def encode_frame(kind: int, meta: bytes, payload: Buffer = b"") -> list[Buffer]:
    """The buffers of one frame, in order. The payload is not copied.

    Raises ``LocalProtocolError`` when a length or the kind is out of range.
    """
    if isinstance(payload, memoryview) and payload.itemsize != 1:
        payload = payload.cast("B")  # whoever writes the buffers counts bytes with len()
    meta_len = len(meta)
    payload_len = len(payload)
    if not 0 < kind < _KINDS:
        raise LocalProtocolError(f"frame kind {kind} is outside 1 to {_KINDS - 1}.")
    if meta_len > MAX_META_BYTES:
        raise LocalProtocolError(f"frame kind {kind}: meta of {meta_len} bytes is too long.")
    if payload_len > MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(f"frame kind {kind}: payload of {payload_len} bytes is too long.")
    head = _HEAD.pack(MAGIC, VERSION, kind, meta_len, payload_len)
    checksum = crc32(meta, crc32(head))
    if not payload_len:
        return [head + _CRC.pack(checksum) + meta]
    return [head + _CRC.pack(crc32(payload, checksum)) + meta, payload]


class FrameDecoder:
    """Turns a byte stream into frames, for one connection.

    ``limits`` maps a kind to its largest payload in bytes; kinds that are not in it may carry
    none. It buffers at most one incomplete frame, whose length was checked from its header.
    After an error it stays broken: every later call raises the same error.
    """

    def __init__(self, limits: Mapping[int, int] = MappingProxyType({})) -> None:
        self._limits: dict[int, int] = {}
        self._partial = bytearray()
        self._needed = HEADER_BYTES
        self._error: RemoteProtocolError | None = None
        for kind, limit in limits.items():
            self.set_payload_limit(kind, limit)

    @property
    def buffered(self) -> int:
        """Bytes of an incomplete frame held now."""
        return len(self._partial)

    def set_payload_limit(self, kind: int, limit: int) -> None:
        """Allow payloads of ``kind`` up to ``limit`` bytes, from the next header on."""
        if not 0 < kind < _KINDS or not 0 <= limit <= MAX_PAYLOAD_BYTES:
            raise LocalProtocolError(f"payload limit {limit} for frame kind {kind} is absurd.")
        self._limits[kind] = limit

    def feed(self, data: Buffer) -> list[Frame]:
        """Take the next bytes of the stream; the frames that are now whole, in order.

        Raises ``RemoteProtocolError``; frames before the bad one in the same call are lost
        with it, because the connection must be closed anyway.
        """
        if self._error is not None:
            raise self._error
        partial = self._partial
        if partial:
            return self._feed_partial(memoryview(data))
        block = data if type(data) is bytes else bytes(data)
        frames: list[Frame] = []
        at = self._parse(block, frames)
        if at < len(block):
            partial += memoryview(block)[at:]
        return frames

    def _feed_partial(self, data: memoryview) -> list[Frame]:
        """Complete the frame in ``_partial`` first: a large frame is copied twice, no more."""
        partial = self._partial
        frames: list[Frame] = []
        at = 0
        while partial and at < len(data):
            step = min(self._needed - len(partial), len(data) - at)
            partial += data[at : at + step]
            at += step
            if len(partial) < self._needed:
                break
            block = bytes(partial)
            if self._parse(block, frames):
                partial.clear()
        if at < len(data):
            block = bytes(data[at:])
            done = self._parse(block, frames)
            partial += memoryview(block)[done:]
        return frames

    def _parse(self, block: bytes, frames: list[Frame]) -> int:
        """Append the whole frames of ``block``; returns where the incomplete rest begins."""
        at = 0
        size = len(block)
        while size - at >= HEADER_BYTES:
            magic, version, kind, meta_len, payload_len, checksum = _HEADER.unpack_from(block, at)
            if magic != MAGIC or version != VERSION:
                raise self._broken(_why_not_ours(magic, version))
            if meta_len > MAX_META_BYTES:
                raise self._broken(f"frame kind {kind}: meta of {meta_len} bytes is too long.")
            if payload_len > self._limits.get(kind, 0):
                raise self._broken(
                    f"frame kind {kind}: payload of {payload_len} bytes, where at most"
                    f" {self._limits.get(kind, 0)} are allowed."
                )
            body = at + HEADER_BYTES
            middle = body + meta_len
            end = middle + payload_len
            if end > size:
                self._needed = end - at
                return at
            raw = block if at == 0 and end == size else block[at:end]
            view = memoryview(raw)
            start = HEADER_BYTES + meta_len
            if crc32(view[HEADER_BYTES:], crc32(view[:12])) != checksum:
                raise self._broken(f"frame kind {kind}: the checksum is wrong.")
            frames.append(Frame(kind, raw[HEADER_BYTES:start], view[start:], raw))
            at = end
        self._needed = HEADER_BYTES
        return at

    def _broken(self, message: str) -> RemoteProtocolError:
        self._partial = bytearray()
        self._error = RemoteProtocolError(message)
        return self._error


def _why_not_ours(magic: bytes, version: int) -> str:
    if magic != MAGIC:
        return f"not an edgellm frame: it begins with {magic.hex()}."
    return (
        f"the peer speaks version {version} of the protocol, this side version {VERSION};"
        " use the same release of edgellm on both."
    )
