"""Battery and temperature: what the system tells, and nothing where it fails."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from edgellm.probe import Conditions, read_conditions


def sensors(monkeypatch: pytest.MonkeyPatch, battery: Any, temperatures: Any) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: temperatures, raising=False)


def reading(celsius: Any) -> SimpleNamespace:
    return SimpleNamespace(label="", current=celsius)


def test_a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    battery = SimpleNamespace(percent=61.5, power_plugged=False)
    heat = {"nvme": [reading(71.0)], "coretemp": [reading(48.0), reading(55.0)]}
    sensors(monkeypatch, battery, heat)
    found = read_conditions()
    assert found == Conditions(battery_percent=61.5, on_mains=False, temperature_c=55.0)
    assert found.to_plain() == {"battery_percent": 61.5, "on_mains": False, "temperature_c": 55.0}


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sensors(monkeypatch, None, {})
    assert read_conditions() == Conditions()
    assert Conditions().to_plain() == {}


def test_unknown_sensors_serve_where_no_better_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    sensors(monkeypatch, None, {"acpitz": [reading(41.0)], "wifi": [reading(39.0)]})
    assert read_conditions().temperature_c == 41.0


def test_nonsense_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    battery = SimpleNamespace(percent=math.nan, power_plugged=None)
    sensors(monkeypatch, battery, {"k10temp": [reading(math.nan), reading(None), reading(-273.0)]})
    assert read_conditions() == Conditions()


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), NotImplementedError()])
def test_broken_sensors_are_no_sensors(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(psutil, "sensors_battery", fail, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", fail, raising=False)
    assert read_conditions() == Conditions()


def test_systems_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    assert read_conditions() == Conditions()
