"""What the tag table is made of: one line for each kind of message. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, cast

from edgellm.errors import LocalProtocolError
from edgellm.wire.schema import Check


@dataclass(frozen=True, slots=True)
class Spec:
    """One line of the table: the class of a kind and the checks of its fields, in order."""

    kind: int
    make: Callable[..., Any]
    checks: tuple[tuple[str, Check], ...]
    rule: Callable[[Any], None] | None = None
    payload: bool = field(init=False)
    """Whether the message carries raw bytes."""
    name: str = field(init=False)
    values: Callable[[Any], tuple[Any, ...]] = field(init=False)
    """The fields of a message, in order, without the payload."""

    def __post_init__(self) -> None:
        names = [each.name for each in fields(cast(Any, self.make))]
        checked = [name for name, _ in self.checks]
        if checked != [name for name in names if name != "payload"]:
            raise LocalProtocolError(f"message kind {self.kind}: the table and the class differ.")
        object.__setattr__(self, "payload", "payload" in names)
        object.__setattr__(self, "name", cast(type, self.make).__name__)
        object.__setattr__(self, "values", _getter(checked))


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """``attrgetter`` that answers a tuple for none and for one name as well."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: tuple([getattr(message, name) for name in names])
