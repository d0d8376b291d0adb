"""A cluster that is not here, as a person writes it down in TOML. Pure: text in, devices out.

::

    [model]                      # instead of a model file
    name = "Llama 3 8B"
    layers = 32
    width = 4096
    ff = 14336
    heads = 32
    kv_heads = 8
    vocab = 128256

    [link.cable]                 # how devices are connected
    round_trip_ms = 0.5
    mbit_per_s = 940

    [[device]]
    name = "pi"
    count = 4                    # pi-1 to pi-4
    memory = "7GiB"
    decode_gb_per_s = 9.0        # gigabytes of weights read a second
    prefill_gflops = 60
    link = "cable"
    coordinator = true           # whoever asks sits here; the first of them

    [[between]]                  # where two devices have a link of their own
    devices = ["laptop", "desk"]
    round_trip_ms = 0.2
    mbit_per_s = 9400
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from edgellm.errors import UsageError
from edgellm.planner.inputs import DeviceOffer
from edgellm.planner.sketch import ModelSketch
from edgellm.planner.speeds import DEFAULT_LINK, DeviceSpeed, Link, Links
from edgellm.types import DeviceId

MAX_DEVICES = 256
MAX_TEXT = 1 << 20
_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>[KMGT]i?B|B)")
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NAME = re.compile(r"[^\s:,]{1,60}")

_MODEL = ("name", "layers", "width", "ff", "heads", "kv_heads", "vocab", "bits_per_weight",
          "head_size", "experts", "experts_used", "tied_head")  # fmt: skip
_DEVICE = ("name", "count", "memory", "kept_apart", "decode_gb_per_s", "prefill_gflops",
           "step_overhead_ms", "link", "coordinator")  # fmt: skip
_LINK = ("round_trip_ms", "mbit_per_s", "shared")
_BETWEEN = ("devices", "round_trip_ms", "mbit_per_s")


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """What such a file says."""

    offers: tuple[DeviceOffer, ...]
    links: Links
    coordinator_id: DeviceId | None
    model: ModelSketch | None
    model_name: str


@dataclass(frozen=True, slots=True)
class _Medium:
    """How a device is connected."""

    link: Link
    shared: bool
    """Whether two devices on it share its bandwidth, as on one Wi-Fi: a row goes over it twice."""


def read_cluster(text: str, source: str = "the cluster file") -> ClusterFile:
    """Read a cluster file's text. Raises UsageError that says where and what is wrong."""
    if len(text) > MAX_TEXT:
        raise UsageError(f"{source} has {len(text)} characters; at most {MAX_TEXT} make sense.")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise UsageError(f"{source} is nested too deeply.") from error
    root = _Section(data, source)
    root.only(("model", "link", "device", "between"))
    media = {
        name: _medium(_Section(each, f"{source}: [link.{name}]"))
        for name, each in root.mapping("link").items()
    }
    offers, mediums, coordinator = _devices(root, source, media)
    known = _between_all(offers, mediums)
    ids = {offer.name: offer.device_id for offer in offers}
    for number, each in enumerate(root.sequence("between"), 1):
        section = _Section(each, f"{source}: [[between]] number {number}")
        section.only(_BETWEEN)
        pair = section.names("devices")
        for name in pair:
            if name not in ids:
                raise UsageError(f"{section.where}: there is no device {name!r}{_like(name, ids)}")
        link = section.link()
        known[ids[pair[0]], ids[pair[1]]] = known[ids[pair[1]], ids[pair[0]]] = link
    model, model_name = None, ""
    if "model" in data:
        model, model_name = _model(_Section(data["model"], f"{source}: [model]"))
    return ClusterFile(
        tuple(offers), Links(MappingProxyType(known)), coordinator, model, model_name
    )


def _devices(
    root: _Section, source: str, media: Mapping[str, _Medium]
) -> tuple[list[DeviceOffer], list[_Medium | None], DeviceId | None]:
    offers: list[DeviceOffer] = []
    mediums: list[_Medium | None] = []
    coordinator: DeviceId | None = None
    tables = root.sequence("device")
    if not tables:
        raise UsageError(f"{source} has no [[device]]: there is nothing to plan for.")
    for number, each in enumerate(tables, 1):
        section = _Section(each, f"{source}: [[device]] number {number}")
        if "name" not in section.data:  # a slip in the name of the name
            section.only(_DEVICE)
        name = section.text("name")
        section.where = f"{source}: device {name!r}"
        section.only(_DEVICE)
        if not _NAME.fullmatch(name):
            raise UsageError(f"{section.where}: a name has no spaces, colons or commas.")
        count = section.whole("count", 1, low=1, high=MAX_DEVICES)
        medium = _chosen_medium(section, media)
        memory, apart = section.size("memory"), section.size("kept_apart", 0)
        speed = _speed(section)
        for copy in range(count):
            device_id = DeviceId(f"{len(offers) + 1:064x}")
            one = name if count == 1 else f"{name}-{copy + 1}"
            if any(offer.name == one for offer in offers):
                raise UsageError(f"{section.where}: there is a device {one!r} already.")
            offers.append(DeviceOffer(one, device_id, memory, speed, apart))
            mediums.append(medium)
            if copy == 0 and section.flag("coordinator"):
                if coordinator is not None:
                    raise UsageError(f"{section.where}: another device is the coordinator.")
                coordinator = device_id
        if len(offers) > MAX_DEVICES:
            raise UsageError(f"{source} has more than {MAX_DEVICES} devices.")
    return offers, mediums, coordinator


def _speed(section: _Section) -> DeviceSpeed | None:
    keys = ("decode_gb_per_s", "prefill_gflops")
    given = [key for key in keys if key in section.data]
    if not given:
        return None
    if len(given) < len(keys):
        missing = next(key for key in keys if key not in given)
        raise UsageError(f"{section.where}: {given[0]} is there, but {missing} is missing.")
    return DeviceSpeed(
        section.number("decode_gb_per_s", low=1e-4, high=1e6) * 1e9,
        section.number("prefill_gflops", low=1e-3, high=1e9) * 1e9,
        section.number("step_overhead_ms", 0.2, low=0.0, high=1e4) / 1e3,
    )


def _chosen_medium(section: _Section, media: Mapping[str, _Medium]) -> _Medium | None:
    if "link" not in section.data:
        return None
    name = section.text("link")
    if name not in media:
        raise UsageError(f"{section.where}: there is no [link.{name}]{_like(name, media)}")
    return media[name]


def _medium(section: _Section) -> _Medium:
    section.only(_LINK)
    return _Medium(section.link(), section.flag("shared"))


def _between_all(
    offers: list[DeviceOffer], mediums: list[_Medium | None]
) -> dict[tuple[DeviceId, DeviceId], Link]:
    """Half the way on the medium of each, at the bandwidth of the slower."""
    known = {}
    for (one, here), (other, there) in itertools.permutations(
        list(zip(offers, mediums, strict=True)), 2
    ):
        a = here.link if here else DEFAULT_LINK
        b = there.link if there else DEFAULT_LINK
        twice = here is not None and here is there and here.shared
        rate = min(a.bytes_per_s, b.bytes_per_s) / (2 if twice else 1)
        round_trip = (a.round_trip_s + b.round_trip_s) / 2
        known[one.device_id, other.device_id] = Link(round_trip, rate)
    return known


def _model(section: _Section) -> tuple[ModelSketch, str]:
    section.only(_MODEL)
    most = 1 << 24
    sketch = ModelSketch(
        n_layers=section.whole("layers", low=1, high=1024),
        n_embd=section.whole("width", low=1, high=most),
        n_ff=section.whole("ff", low=1, high=most),
        heads=section.whole("heads", low=1, high=most),
        kv_heads=section.whole("kv_heads", low=1, high=most),
        n_vocab=section.whole("vocab", low=1, high=most),
        bits_per_weight=section.number("bits_per_weight", 4.85, low=0.5, high=32.0),
        head_size=section.whole("head_size", 0, low=0, high=most),
        experts=section.whole("experts", 0, low=0, high=4096),
        experts_used=section.whole("experts_used", 0, low=0, high=4096),
        tied_head=section.flag("tied_head"),
    )
    return sketch, section.text("name", "the model")


def _like(name: str, known: Collection[str]) -> str:
    """The end of a sentence about a name that is not known."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."


class _Section:
    """One table of the file, and where it stands, for the words of an error."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise UsageError(f"{where} is {_kind(data)}; a table was expected.")
        self.data: dict[str, Any] = data
        self.where = where

    def only(self, known: Collection[str]) -> None:
        for key in self.data:
            if key not in known:
                raise UsageError(f"{self.where}: {key!r} is not known{_like(key, known)}")

    def mapping(self, key: str) -> dict[str, Any]:
        return _Section(self.data.get(key, {}), f"{self.where}: [{key}]").data

    def sequence(self, key: str) -> list[Any]:
        value = self.data.get(key, [])
        if not isinstance(value, list):
            raise UsageError(f"{self.where}: write [[{key}]], with two brackets on each side.")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str) or not value:
            raise UsageError(f"{self.where}: {key} is {_kind(value)}; a text was expected.")
        return value

    def names(self, key: str) -> tuple[str, str]:
        value = self._value(key, None)
        if (
            not isinstance(value, list)
            or len(value) != len({str(one) for one in value})
            or len(value) != 2
            or not all(isinstance(one, str) for one in value)
        ):
            raise UsageError(f'{self.where}: {key} are two names, like ["a", "b"].')
        return value[0], value[1]

    def flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise UsageError(f"{self.where}: {key} is {_kind(value)}; true or false was expected.")
        return value

    def whole(self, key: str, default: int | None = None, *, low: int, high: int) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{self.where}: {key} is {_kind(value)}; an integer was expected.")
        if not low <= value <= high:
            raise UsageError(f"{self.where}: {key} is {value}; {low} to {high} can be.")
        return value

    def number(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{self.where}: {key} is {_kind(value)}; a number was expected.")
        if not (math.isfinite(value) and low <= value <= high):
            raise UsageError(f"{self.where}: {key} is {value}; {low:g} to {high:g} can be.")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        """Bytes of ``"7GiB"``, or 0."""
        value = self._value(key, default)
        if value == 0 and not isinstance(value, bool):
            return 0
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            shown = repr(value) if isinstance(value, str) else _kind(value)
            raise UsageError(f'{self.where}: {key} is {shown}; a size like "7GiB" was expected.')
        size = float(match["number"]) * _UNITS[match["unit"][0]]
        if size >= 1 << 50:
            raise UsageError(f"{self.where}: {key} is {value}; less than 1024TiB can be.")
        return int(size)

    def link(self) -> Link:
        return Link(
            self.number("round_trip_ms", low=0.0, high=1e6) / 1e3,
            self.number("mbit_per_s", low=1e-3, high=1e7) * 1e6 / 8,
        )

    def _value(self, key: str, default: Any) -> Any:
        if key in self.data:
            return self.data[key]
        if default is None:
            raise UsageError(f"{self.where}: {key} is missing.")
        return default


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: f"the number {value}", float: f"the number {value}",
             str: f"the text {value!r}", list: "a list", dict: "a table"}  # fmt: skip
    return kinds.get(type(value), "something else")
