"""What a coordinator knows: the devices that it is connected to, their links, the model to load."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.runtime.session import Session
from edgellm.wire.messages import DeviceInfo


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected device."""

    info: DeviceInfo
    host: str
    port: int
    session: Session
    how: str = ""
    """How it was found, in a word or two."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one device to another, as measured from the first."""

    source: str
    """Name of a device."""
    target: str
    round_trip_s: float
    """Of one token's activations."""
    bytes_per_s: float
    problem: str = ""
    """Why it could not be measured."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, for every device of a plan."""

    engine: str
    name: str
    path: str
    """Of the file. It is told on this machine only: elsewhere it means nothing."""
    digest: str
    """Empty where there is no file."""
    width: int
    vocab: int
