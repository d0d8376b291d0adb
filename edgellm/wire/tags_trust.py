"""The tag table's lines for ``trust``. Pure."""

from __future__ import annotations

from edgellm.wire import schema
from edgellm.wire.schema import SchemaError
from edgellm.wire.spec import Spec
from edgellm.wire.trust import (
    Forget,
    Forgot,
    Goodbye,
    Introduce,
    InvitationNews,
    InvitationOpen,
    Leave,
    MembersSeen,
    OpenInvitation,
    PeerProbed,
    ProbePeer,
    QueryMembers,
)

MAX_CERTIFICATE_BYTES = 2048
MAX_MEMBERS = 256
MAX_NAME = 64

_REQUEST = ("request", schema.integer())
_DEVICE_ID = ("device_id", schema.digest)
_PROBLEM = ("problem", schema.label(500))
_SECONDS = schema.number(0.0, 1e9)


def _check_introduction(said: Introduce) -> None:
    if not said.forgotten and not len(said.payload):
        raise SchemaError("a device is introduced without its certificate")


TRUST = (
    Spec(58, QueryMembers, ()),
    Spec(
        59,
        MembersSeen,
        (("members", schema.sequence_of(schema.mapping_of(schema.tree), MAX_MEMBERS)),),
    ),
    Spec(
        70,
        Introduce,
        (
            _DEVICE_ID,
            ("name", schema.label(MAX_NAME)),
            ("version", schema.integer()),
            ("forgotten", schema.flag),
            ("introduced_by", schema.digest),
        ),
        _check_introduction,
    ),
    Spec(71, OpenInvitation, (_REQUEST, ("within_s", _SECONDS))),
    Spec(
        72,
        InvitationOpen,
        (_REQUEST, ("code", schema.label(32)), ("expires_s", _SECONDS), _PROBLEM),
    ),
    Spec(73, Forget, (_REQUEST, _DEVICE_ID)),
    Spec(74, Forgot, (_REQUEST, _PROBLEM)),
    Spec(75, Leave, (_REQUEST,)),
    Spec(76, Goodbye, (("reason", schema.label(200)), ("within_s", _SECONDS))),
    Spec(77, ProbePeer, (_REQUEST, _DEVICE_ID)),
    Spec(78, PeerProbed, (_REQUEST, ("silent_s", _SECONDS))),
    Spec(
        79,
        InvitationNews,
        (
            _REQUEST,
            ("over", schema.flag),
            ("device_id", schema.label(64)),
            ("name", schema.label(MAX_NAME)),
            _PROBLEM,
        ),
    ),
)
