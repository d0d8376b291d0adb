"""Battery and temperature, where the system tells: a snapshot as plain data.

Whether a device on battery takes part, and how much, is for a policy elsewhere to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil

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


def read_conditions() -> Conditions:
    """As of now. Quick, and never raises: sensors fail in many ways."""
    battery = _ask("sensors_battery")
    percent = None if battery is None else float(battery.percent)
    return Conditions(
        battery_percent=percent if percent is not None and math.isfinite(percent) else None,
        on_mains=None if battery is None else battery.power_plugged,
        temperature_c=_temperature(_ask("sensors_temperatures") or {}),
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
