"""What people are told when two devices were not paired. Pure; may import only ``errors``.

The other side sends a number, never words: before it has proven itself it writes on no screen.
"""

from __future__ import annotations

from edgellm.errors import PairingError
from edgellm.identity.invitation import Reason

_NEW_CODE = "Run `edgellm invite` on the other device, and use the code that it shows."
_AGAIN = "Try again."

# To whom joins: a sentence, and what to do now.
_TO_JOINER: dict[Reason, tuple[str, str]] = {
    Reason.NO_INVITATION: ("the other device has no invitation open.", _NEW_CODE),
    Reason.EXPIRED: ("the invitation has expired.", _NEW_CODE),
    Reason.CLOSED: ("the invitation was closed after too many wrong codes.", _NEW_CODE),
    Reason.USED: ("another device has used this invitation.", _NEW_CODE),
    Reason.BUSY: ("the other device is busy with other attempts to join.", "Wait 2 s, try again."),
    Reason.WRONG_CODE: ("the code is wrong.", ""),
    Reason.BROKEN: ("the other device does not follow the pairing protocol.", _AGAIN),
    Reason.LATE: ("pairing took too long.", _AGAIN),
    Reason.ITSELF: ("this is the device that invites.", "Use the code on another device."),
    Reason.NOT_SAVED: ("the other device could not let this one in.", "Its screen says why."),
    Reason.OTHER_CLUSTER: (
        "this device already belongs to another cluster.",
        "To leave it, forget the other devices here (`edgellm forget`), then join again.",
    ),
    Reason.UNPROVEN: (
        "what answered is not the device that shows the code.",
        "Check the code and the address; then try again.",
    ),
}

# To whom invites: the joiner's own screen says what to do.
_TO_INVITER: dict[Reason, str] = {
    Reason.NO_INVITATION: "a device wanted to join, but no invitation is open.",
    Reason.EXPIRED: "a device wanted to join, but the invitation has expired.",
    Reason.CLOSED: "a device wanted to join, but the invitation was closed after wrong codes.",
    Reason.USED: "a device wanted to join by an invitation that another one has used.",
    Reason.BUSY: "a device wanted to join while others were trying.",
    Reason.WRONG_CODE: "a device gave a wrong code.",
    Reason.BROKEN: "a device that wanted to join does not follow the pairing protocol.",
    Reason.LATE: "a device that wanted to join took too long.",
    Reason.ITSELF: "this device tried to join itself.",
    Reason.NOT_SAVED: "a device could not be let in.",
    Reason.OTHER_CLUSTER: "a device that wanted to join belongs to another cluster.",
    Reason.UNPROVEN: "a device that wanted to join could not make sure that this is the inviter.",
}


class RefusedError(PairingError):
    """One side refused. What the other side said is not proven: it may be somebody in between.

    ``tries_left`` counts where ``reason`` is a wrong code.
    """

    def __init__(self, reason: Reason, tries_left: int, message: str, hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.tries_left = tries_left


def refused(reason: Reason, tries_left: int, why: str, *, joining: bool) -> RefusedError:
    """The error for this side's people. ``why``: what this side found, in words of its own."""
    message, hint = _TO_JOINER[reason] if joining else (_TO_INVITER[reason], "")
    if reason is Reason.WRONG_CODE:
        message = f"{message[:-1]}; {_tries(tries_left)}."
        if joining:
            hint = "Check it and try again." if tries_left else _NEW_CODE
    if why:
        message = f"{message[:-1]}: {why}"
    return RefusedError(reason, tries_left, message, hint or None)


def _tries(left: int) -> str:
    if left <= 0:
        return "the invitation is closed"
    return "1 try is left" if left == 1 else f"{left} tries are left"
