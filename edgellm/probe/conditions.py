"""Battery and temperature, where the system tells, and what a device on battery still offers.

psutil is asked first; where it knows nothing, the kernel's own files are read, a bounded piece of
each. ``OnBattery`` is the device's choice; what others hear of it is checked like all they hear.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgellm.settings import OnBattery

_PROCESSOR_SENSORS = (
    "coretemp",
    "k10temp",
    "zenpower",
    "cpu_thermal",
    "cpu-thermal",
    "soc_thermal",
)
"""What drivers call the processor's sensor, best first: Intel, AMD, Raspberry Pi and other Arm."""
_LOWEST_C, _HIGHEST_C = -50.0, 150.0
_SYS = Path("/sys")
_MAX_READ = 256
_MAX_ENTRIES = 64
POLICY = "on_battery"
"""Among a device's figures, while it runs on battery: the number of its choice."""
_CHOICES = tuple(OnBattery)
_PARTS = {OnBattery.USE: 1.0, OnBattery.CAP: 0.5, OnBattery.EXCLUDE: 0.0}


@dataclass(frozen=True, slots=True)
class Conditions:
    """None: the system does not tell."""

    battery_percent: float | None = None
    on_mains: bool | None = None
    """False while the battery is all there is."""
    temperature_c: float | None = None
    """Of the hottest sensor of the processor, or of all where none is known to be its."""

    def to_plain(self) -> dict[str, float | bool]:
        """What is known, as ``--json`` shows it."""
        plain = {
            "battery_percent": self.battery_percent,
            "on_mains": self.on_mains,
            "temperature_c": self.temperature_c,
        }
        return {name: value for name, value in plain.items() if value is not None}

    def figures(self, policy: OnBattery) -> dict[str, int | float]:
        """What is known, as numbers for ``DeviceInfo.figures``; on battery with the policy."""
        told = {name: value + 0 for name, value in self.to_plain().items()}  # a flag becomes 1
        if self.on_mains is False:
            told[POLICY] = _CHOICES.index(policy)
        return told

    def part(self, policy: OnBattery) -> float:
        """The part of its memory that a device offers under these conditions."""
        return _PARTS[policy] if self.on_mains is False else 1.0


def battery_note(figures: Mapping[str, object]) -> str:
    """What a device's figures say of its battery, where it offers less for that: goes on from its
    name. Empty for any other. Never raises, whatever the figures are."""
    policy = figures.get(POLICY)
    if isinstance(policy, bool) or not isinstance(policy, int) or not 0 <= policy < len(_CHOICES):
        return ""
    percent = figures.get("battery_percent")
    known = isinstance(percent, int | float) and 0 <= percent <= 100  # also refuses NaN
    left = f" ({percent:.0f} % left)" if known else ""
    choice = _CHOICES[policy]
    if choice is OnBattery.EXCLUDE:
        return f"runs on battery{left}, and then it is not used (--on-battery exclude)"
    if choice is OnBattery.CAP:
        return f"runs on battery{left}, and then it offers half its memory (--on-battery cap)"
    return ""


def read_conditions(sys: Path = _SYS) -> Conditions:
    """As of now. Quick, and never raises: sensors fail in many ways. ``sys`` is for tests."""
    battery = _ask("sensors_battery")
    temperature = _temperature(_ask("sensors_temperatures") or {})
    if temperature is None:
        temperature = max(_zones(sys / "class/thermal"), default=None)
    if battery is None:
        percent, on_mains = _supplies(sys / "class/power_supply")
    else:
        percent, on_mains = float(battery.percent), battery.power_plugged
    return Conditions(
        battery_percent=percent if percent is not None and 0 <= percent <= 100 else None,
        on_mains=on_mains,
        temperature_c=temperature,
    )


def _ask(name: str) -> Any:
    function = getattr(psutil, name, None)  # not every system has it
    try:
        return function() if function is not None else None
    except (OSError, RuntimeError, ValueError, NotImplementedError, psutil.Error):
        return None


def _temperature(sensors: dict[str, list[Any]]) -> float | None:
    known = [sensors[name] for name in _PROCESSOR_SENSORS if name in sensors]
    readings = known[0] if known else [reading for many in sensors.values() for reading in many]
    values = [
        float(reading.current)
        for reading in readings
        if isinstance(reading.current, int | float) and _LOWEST_C < reading.current < _HIGHEST_C
    ]
    return max(values, default=None)


# --- the kernel's own files -----------------------------------------------------------


def _supplies(folder: Path) -> tuple[float | None, bool | None]:
    """(percent of the battery, whether there is other power), as far as power supplies tell.

    Batteries of mice and keyboards are supplies too; the kernel says that their scope is a device.
    """
    percent: float | None = None
    mains: bool | None = None
    discharging = False
    for supply in _entries(folder):
        if _word(supply / "scope") == "device":
            continue
        kind = _word(supply / "type")
        if kind == "battery":
            told = _amount(supply / "capacity")
            percent = told if percent is None else percent
            discharging |= _word(supply / "status") == "discharging"
        elif kind in ("mains", "usb", "wireless"):
            online = _amount(supply / "online")
            if online is not None:
                mains = bool(mains) or online > 0
    if percent is None:
        return None, None
    if mains is None:  # no plug is listed: the battery says where its power goes
        mains = not discharging
    return percent, mains


def _zones(folder: Path) -> list[float]:
    """Degrees Celsius of the thermal zones; of the processor's alone where some are known so."""
    found = [
        (_word(zone / "type"), told / 1000)
        for zone in _entries(folder)
        if (told := _amount(zone / "temp")) is not None
    ]
    sane = [(kind, degrees) for kind, degrees in found if _LOWEST_C < degrees < _HIGHEST_C]
    own = [degrees for kind, degrees in sane if "cpu" in kind or kind.startswith("x86_pkg")]
    return own or [degrees for _, degrees in sane]


def _entries(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(folder.iterdir())[:_MAX_ENTRIES]


def _word(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_READ).decode("ascii", "replace").strip().lower()
    except OSError:
        return ""


def _amount(path: Path) -> float | None:
    try:
        value = float(_word(path))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
