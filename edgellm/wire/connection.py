"""One connection's state machine. Sans-IO: bytes in, events out, and time is an argument.

This file does not know sockets, transports or clocks: ``now`` is any clock that only goes
forward, in seconds. Whoever drives it writes out what ``send`` and ``data_to_send`` return,
feeds what was read to ``receive``, and calls ``handle_timer`` at ``next_timer()``.

Every change of state is a line in ``TRANSITIONS``; every kind of message that a state takes
from the peer is in ``_accepts``. A connection that is closed stays closed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeAlias

from edgellm.errors import (
    EdgeError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    error_from_dict,
)
from edgellm.wire.frames import Buffer, Frame, FrameDecoder
from edgellm.wire.messages import (
    DEFAULT_PAYLOAD_LIMITS,
    NETWORK_KINDS,
    NO_SEQUENCE,
    PROTOCOL,
    ErrorReport,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
    decode,
    encode,
    kind_of,
)


class Role(enum.Enum):
    DIALER = "dialer"
    LISTENER = "listener"


class State(enum.Enum):
    NEW = "new"
    """A dialer that has not said ``Hello`` yet."""
    WAIT_HELLO = "wait_hello"
    WAIT_WELCOME = "wait_welcome"
    OPEN = "open"
    CLOSED = "closed"


class Trigger(enum.Enum):
    START = "start"
    """The dialer says ``Hello``."""
    HELLO = "hello"
    WELCOME = "welcome"
    CLOSE = "close"
    """This side closes, the peer's stream ends, something broke, or time is up."""


TRANSITIONS: Final[Mapping[tuple[State, Trigger], State]] = MappingProxyType(
    {
        (State.NEW, Trigger.START): State.WAIT_WELCOME,
        (State.NEW, Trigger.CLOSE): State.CLOSED,
        (State.WAIT_HELLO, Trigger.HELLO): State.OPEN,
        (State.WAIT_HELLO, Trigger.CLOSE): State.CLOSED,
        (State.WAIT_WELCOME, Trigger.WELCOME): State.OPEN,
        (State.WAIT_WELCOME, Trigger.CLOSE): State.CLOSED,
        (State.OPEN, Trigger.CLOSE): State.CLOSED,
    }
)

_HELLO: Final = kind_of(Hello)
_WELCOME: Final = kind_of(Welcome)
_PING: Final = kind_of(Ping)
_PONG: Final = kind_of(Pong)
_ERROR: Final = kind_of(ErrorReport)
CONNECTION: Final = 0
"""No plan's epoch: an ``ErrorReport`` with it says why its sender closes the connection."""
_MAX_NONCE: Final = (1 << 32) - 1
_FIRST: Final = {Role.DIALER: State.NEW, Role.LISTENER: State.WAIT_HELLO}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. The defaults are the failure detector's: suspect early, bury late."""

    handshake_s: float = 5.0
    """From the beginning to the peer's ``Hello`` or ``Welcome``."""
    ping_after_s: float = 1.0
    """Silence of the peer after which it is asked for a sign of life, again and again."""
    dead_after_s: float = 5.0
    """Silence after which it counts as lost."""
    max_lag_s: float = 0.5
    """A timer handled later than this says that *we* were stopped: nobody is accused for it."""


ATTENTIVE: Final = Timeouts(ping_after_s=0.5)
"""Between nodes, and to devices that may have a stage: a heartbeat each half second that nothing
else was heard."""
NO_HEARTBEATS: Final = Timeouts(ping_after_s=1e8, dead_after_s=2e8)
"""Only to measure what heartbeats cost."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The handshake is done."""

    peer: Hello | Welcome


@dataclass(frozen=True, slots=True)
class MessageReceived:
    message: Message
    frame: Frame
    """What it came in; ``frame.raw`` can be sent on as it is."""


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A frame of one of the ``undecoded`` kinds: whole, its checksum right, not looked into."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class Closed:
    """The last event. ``reason`` is None only when this side closed on purpose."""

    reason: EdgeError | None


Event: TypeAlias = Opened | MessageReceived | FrameReceived | Closed


class Connection:
    """The state of one connection, seen from one side.

    ``name``, ``device_id``, ``software`` and ``boot`` are what this side says of itself.
    ``allowed`` are the kinds accepted once the connection is open. Frames of an ``undecoded`` kind
    are handed on as ``FrameReceived``, for a node that only checks and forwards them.
    """

    def __init__(
        self,
        role: Role,
        now: float,
        *,
        name: str,
        device_id: str,
        software: str,
        boot: int = 0,
        timeouts: Timeouts | None = None,
        allowed: frozenset[int] = NETWORK_KINDS,
        undecoded: frozenset[int] = frozenset(),
        payload_limits: Mapping[int, int] = DEFAULT_PAYLOAD_LIMITS,
    ) -> None:
        self.role = role
        self.state = _FIRST[role]
        self.peer: Hello | Welcome | None = None
        self.round_trip_s: float | None = None
        """Of the latest answered ping."""
        self._identity = (PROTOCOL, name, device_id, software, boot)
        self._timeouts = timeouts or Timeouts()
        self._undecoded = undecoded & allowed
        in_open = allowed - {_HELLO, _WELCOME}
        self._accepts = {
            State.WAIT_HELLO: frozenset({_HELLO}),
            State.WAIT_WELCOME: frozenset({_WELCOME, _ERROR}),
            State.OPEN: in_open,
        }
        self._sendable = in_open
        self._decoder = FrameDecoder(payload_limits)
        self._output: list[Buffer] = []
        self._began = now
        self._heard = now
        self._pinged = now
        self._nonce = 0
        self._awaited_pong: int | None = None

    # --- sending ----------------------------------------------------------------------

    def start(self, now: float) -> list[Buffer]:
        """The dialer's ``Hello``. The handshake's time runs from here."""
        self._move(Trigger.START)
        self._began = self._heard = now
        return encode(Hello(*self._identity))

    def send(self, message: Message) -> list[Buffer]:
        """What to write for ``message``; answers that wait in ``data_to_send`` come first.

        Raises ``LocalProtocolError`` when the connection is not open, or the message is not
        for this connection.
        """
        buffers = encode(message)
        self._check_sendable(kind_of(type(message)))
        return self._drained(buffers)

    def send_raw(self, frame: Frame) -> list[Buffer]:
        """What to write to pass on a frame that another connection received."""
        self._check_sendable(frame.kind)
        return self._drained([frame.raw])

    def data_to_send(self) -> list[Buffer]:
        """Answers that the machine itself gave since the last call (welcome, pong, ping)."""
        return self._drained([])

    def set_payload_limit(self, kind: int, limit: int) -> None:
        """Allow payloads of ``kind`` up to ``limit`` bytes: a plan says what to expect."""
        self._decoder.set_payload_limit(kind, limit)

    # --- receiving --------------------------------------------------------------------

    def receive(self, data: Buffer, now: float) -> list[Event]:
        """The events in the next bytes from the peer; ``b""`` is the end of its stream.

        Never raises for what the peer sent: the last event is then ``Closed`` with the
        ``RemoteProtocolError``. Bytes after the end are ignored.
        """
        if self.state is State.CLOSED:
            return []
        if self.state is State.NEW:
            raise LocalProtocolError("a dialer must start before it can receive.")
        if not len(data):
            return [self._close(PeerLostError(self._why_ended()))]
        self._heard = now
        events: list[Event] = []
        try:
            for frame in self._decoder.feed(data):
                if self.state is State.OPEN:
                    self._receive_open(frame, now, events)
                else:
                    self._receive_handshake(frame, now, events)
        except EdgeError as error:
            events.append(self._close(error))
        return events

    def close(self) -> list[Event]:
        """This side is done. Returns the ``Closed`` event, once."""
        return [] if self.state is State.CLOSED else [self._close(None)]

    def _receive_open(self, frame: Frame, now: float, events: list[Event]) -> None:
        if frame.kind in self._undecoded:
            events.append(FrameReceived(frame))
            return
        message = decode(frame, self._accepts[State.OPEN])
        if isinstance(message, Ping):
            self._output += encode(Pong(message.nonce))
        elif isinstance(message, Pong):
            if message.nonce == self._awaited_pong:
                self._awaited_pong = None
                self.round_trip_s = now - self._pinged
        else:
            events.append(MessageReceived(message, frame))

    def _receive_handshake(self, frame: Frame, now: float, events: list[Event]) -> None:
        message = decode(frame, self._accepts[self.state])
        if isinstance(message, ErrorReport):
            raise error_from_dict(message.error)
        if not isinstance(message, (Hello, Welcome)):
            raise RemoteProtocolError(f"{type(message).__name__} is no greeting.")
        if message.protocol != PROTOCOL:
            error = RemoteProtocolError(
                f"{message.name} speaks version {message.protocol} of the protocol,"
                f" this side version {PROTOCOL}.",
                hint="Use the same release of edgellm on both.",
            )
            if self.role is Role.LISTENER:  # the dialer should hear why
                self._output += encode(ErrorReport(CONNECTION, NO_SEQUENCE, error.to_dict()))
            raise error
        if self.role is Role.LISTENER:
            self._output += encode(Welcome(*self._identity))
            self._move(Trigger.HELLO)
        else:
            self._move(Trigger.WELCOME)
        self.peer = message
        self._pinged = now
        events.append(Opened(message))

    # --- time -------------------------------------------------------------------------

    @property
    def heard_at(self) -> float:
        """When the last byte came from the peer, by the clock that it is driven with."""
        return self._heard

    def allow_silence(self, seconds: float) -> None:
        """Count the peer as lost after so much silence, from now on."""
        self._timeouts = replace(self._timeouts, dead_after_s=seconds)

    def next_timer(self) -> float | None:
        """When ``handle_timer`` wants to be called; None when there is nothing to wait for."""
        if self.state in (State.NEW, State.CLOSED):
            return None
        if self.state is not State.OPEN:
            return self._began + self._timeouts.handshake_s
        return min(self._next_ping(), self._heard + self._timeouts.dead_after_s)

    def handle_timer(self, now: float) -> list[Event]:
        """Do what is due at ``now``: a ping into ``data_to_send``, or the end."""
        due = self.next_timer()
        if due is None or now < due:
            return []
        if now - due > self._timeouts.max_lag_s:
            # We did not run when we should have; what the peer sent meanwhile may lie unread.
            self._heard = self._began = now
        if self.state is not State.OPEN:
            if now < self._began + self._timeouts.handshake_s:
                return []
            return [self._close(PeerLostError("the peer did not answer the handshake in time."))]
        if now >= self._heard + self._timeouts.dead_after_s:
            silence = now - self._heard
            return [self._close(PeerLostError(f"the peer was silent for {silence:.1f} s."))]
        if now >= self._next_ping():
            self._nonce = 0 if self._nonce == _MAX_NONCE else self._nonce + 1
            self._pinged = now
            self._awaited_pong = self._nonce
            self._output += encode(Ping(self._nonce))
        return []

    def _next_ping(self) -> float:
        return max(self._heard, self._pinged) + self._timeouts.ping_after_s

    # --- glue -------------------------------------------------------------------------

    def _move(self, trigger: Trigger) -> None:
        target = TRANSITIONS.get((self.state, trigger))
        if target is None:
            raise LocalProtocolError(
                f"a connection cannot {trigger.value} when {self.state.value}."
            )
        self.state = target

    def _close(self, reason: EdgeError | None) -> Closed:
        self._move(Trigger.CLOSE)
        return Closed(reason)

    def _check_sendable(self, kind: int) -> None:
        if self.state is not State.OPEN:
            raise LocalProtocolError(f"the connection is {self.state.value}, not open.")
        if kind not in self._sendable:
            raise LocalProtocolError(f"messages of kind {kind} are not for this connection.")

    def _drained(self, buffers: list[Buffer]) -> list[Buffer]:
        if not self._output:
            return buffers
        waiting, self._output = self._output, []
        return waiting + buffers

    def _why_ended(self) -> str:
        if self.state is State.OPEN:
            return "the peer closed the connection."
        return "the peer closed the connection during the handshake."
