"""Battery and temperature: what the system tells, and nothing where it fails."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from edgellm.probe import Conditions, battery_note, read_conditions
from edgellm.settings import OnBattery

NOWHERE = Path("/nowhere")
"""A system without files of the kernel's."""


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
    assert read_conditions(NOWHERE) == Conditions()
    assert Conditions().to_plain() == {}


def test_unknown_sensors_serve_where_no_better_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    sensors(monkeypatch, None, {"acpitz": [reading(41.0)], "wifi": [reading(39.0)]})
    assert read_conditions().temperature_c == 41.0


def test_nonsense_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    battery = SimpleNamespace(percent=math.nan, power_plugged=None)
    sensors(monkeypatch, battery, {"k10temp": [reading(math.nan), reading(None), reading(-273.0)]})
    assert read_conditions(NOWHERE) == Conditions()


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), NotImplementedError()])
def test_broken_sensors_are_no_sensors(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(psutil, "sensors_battery", fail, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", fail, raising=False)
    assert read_conditions(NOWHERE) == Conditions()


def test_systems_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    assert read_conditions(NOWHERE) == Conditions()


# --- the kernel's own files -------------------------------------------------------------


def supply(root: Path, name: str, **files: str) -> None:
    folder = root / "class/power_supply" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(f"{text}\n")


def zone(root: Path, name: str, kind: str, temp: str) -> None:
    folder = root / "class/thermal" / name
    folder.mkdir(parents=True)
    (folder / "type").write_text(f"{kind}\n")
    (folder / "temp").write_text(f"{temp}\n")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil knows nothing."""
    sensors(monkeypatch, None, {})


@pytest.mark.usefixtures("bare")
def test_a_phone_s_files(tmp_path: Path) -> None:
    supply(tmp_path, "battery", type="Battery", capacity="37", status="Discharging")
    supply(tmp_path, "usb", type="USB", online="0")
    supply(tmp_path, "pen", type="Battery", capacity="2", status="Discharging", scope="Device")
    zone(tmp_path, "thermal_zone0", "battery", "31000")
    zone(tmp_path, "thermal_zone1", "cpu-0-1", "48500")
    zone(tmp_path, "thermal_zone2", "cpu-1-0", "-274000")
    assert read_conditions(tmp_path) == Conditions(37.0, False, 48.5)


@pytest.mark.usefixtures("bare")
def test_a_laptop_s_files(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="80", status="Charging")
    supply(tmp_path, "AC", type="Mains", online="1")
    zone(tmp_path, "thermal_zone0", "acpitz", "41000")
    assert read_conditions(tmp_path) == Conditions(80.0, True, 41.0)


@pytest.mark.usefixtures("bare")
def test_a_battery_without_a_plug_says_where_its_power_goes(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="80", status="Discharging")
    assert read_conditions(tmp_path) == Conditions(80.0, False)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("text", ["", "nan", "inf", "-3", "101", "x" * 9999, "\xff"])
def test_nonsense_in_files_is_left_out(tmp_path: Path, text: str) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity=text, status=text)
    zone(tmp_path, "thermal_zone0", text, text)
    found = read_conditions(tmp_path)
    assert found.battery_percent is None
    assert found.on_mains in (None, True)
    assert found.temperature_c is None or -50 < found.temperature_c < 150


# --- what a device on battery offers ------------------------------------------------------


def test_on_mains_the_policy_is_nobody_s_business() -> None:
    mains = Conditions(80.0, True, 40.0)
    assert [mains.part(policy) for policy in OnBattery] == [1.0, 1.0, 1.0]
    told = mains.figures(OnBattery.EXCLUDE)
    assert told == {"battery_percent": 80.0, "on_mains": 1, "temperature_c": 40.0}
    assert battery_note(told) == ""


@pytest.mark.parametrize(
    ("policy", "part", "says"),
    [
        (OnBattery.USE, 1.0, ""),
        (OnBattery.CAP, 0.5, "runs on battery (37 % left), and then it offers half its memory"),
        (OnBattery.EXCLUDE, 0.0, "runs on battery (37 % left), and then it is not used"),
    ],
)
def test_on_battery_it_offers_what_its_owner_wants(
    policy: OnBattery, part: float, says: str
) -> None:
    found = Conditions(37.0, False)
    assert found.part(policy) == part
    assert battery_note(found.figures(policy)).startswith(says)
    assert bool(battery_note(found.figures(policy))) is bool(says)


@pytest.mark.parametrize("policy", [None, True, -1, 3, 1.0, "cap", 1 << 70])
def test_a_lie_about_a_battery_says_nothing(policy: object) -> None:
    assert battery_note({"on_battery": policy}) == ""
    assert "nan" not in battery_note({"on_battery": 1, "battery_percent": math.nan})
    assert battery_note({"on_battery": 1, "battery_percent": "9" * 9000}).count("9") == 0
