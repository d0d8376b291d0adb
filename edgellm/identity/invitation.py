"""An invitation: one short code, for two minutes, for one device, with three wrong tries. Pure.

May import only ``errors``. Time is an argument: seconds of any clock that never goes back. Not for
several threads at once.
"""

from __future__ import annotations

import enum
import secrets
from collections import deque
from dataclasses import dataclass

from edgellm.errors import PairingError, UsageError

CODE_DIGITS = 8
WITHIN_S = 120.0
MAX_WITHIN_S = 3600.0
TRIES = 3
MAX_ATTEMPTS = 3
ATTEMPT_S = 10.0
"""Longest a whole exchange may take, on either side."""
_YIELD_S = 2.0
"""An honest device proves itself within this time even on a slow computer: the code was typed
before, so nobody is waited for."""


class Reason(enum.IntEnum):
    """Why two devices were not paired; the number crosses the wire."""

    NO_INVITATION = 1
    EXPIRED = 2
    CLOSED = 3
    USED = 4
    BUSY = 5
    WRONG_CODE = 6
    BROKEN = 7
    LATE = 8
    ITSELF = 9
    NOT_SAVED = 10
    OTHER_CLUSTER = 11
    UNPROVEN = 12


@dataclass(eq=False, slots=True)
class Attempt:
    """A device that was sent our share and has yet to prove that it knows the code."""

    began: float
    live: bool = True


class Invitation:
    """The inviter's side of a code. The code is not in the repr."""

    def __init__(self, now: float, *, within_s: float = WITHIN_S, code: str = "") -> None:
        """``code``: only for tests; empty makes a random one. Raises UsageError for a bad time."""
        if not 0 < within_s <= MAX_WITHIN_S:
            raise UsageError(f"an invitation cannot last {within_s:g} s.")
        self.code = check_code(code) if code else f"{secrets.randbelow(10**CODE_DIGITS):08d}"
        self.expires = now + within_s
        self.tries_left = TRIES
        self.joined = ""
        """Device id of who used it."""
        self._attempts: deque[Attempt] = deque()

    def expires_in(self, now: float) -> float:
        """Seconds; 0 when over."""
        return max(0.0, self.expires - now)

    def closed(self, now: float) -> Reason | None:
        """Why nobody can join by it any more; None while it is open."""
        if self.joined:
            return Reason.USED
        if self.tries_left <= 0:
            return Reason.CLOSED
        return Reason.EXPIRED if now >= self.expires else None

    def begin(self, now: float) -> Attempt | None:
        """A place for one more attempt; None while too many are under way.

        A place costs the inviter two SPAKE2 steps (tens of ms), and holding one must neither shut
        others out nor be free to repeat. So there are three; one that is given up stays taken; and
        once its holder had 2 s it goes to whoever asks next. That is at most three attempts begun
        in any 2 s, however many connections somebody opens, and a wait of 2 s at most.
        """
        while self._attempts and now - self._attempts[0].began >= ATTEMPT_S:
            self._attempts.popleft().live = False
        if len(self._attempts) >= MAX_ATTEMPTS:
            if now - self._attempts[0].began < _YIELD_S:
                return None
            self._attempts.popleft().live = False
        made = Attempt(now)
        self._attempts.append(made)
        return made

    def burn(self) -> None:
        """Somebody proved to have a wrong code."""
        self.tries_left -= 1

    def use(self, device_id: str) -> None:
        """That device has joined; nobody else will by this code."""
        self.joined = device_id


def check_code(text: str) -> str:
    """The eight digits of a code as people type it. Raises PairingError for anything else."""
    digits = "".join(text.replace("-", " ").split())
    if len(digits) != CODE_DIGITS or not (digits.isascii() and digits.isdecimal()):
        raise PairingError(
            f"a code has {CODE_DIGITS} digits.", hint="Use the one that `edgellm invite` shows."
        )
    return digits
