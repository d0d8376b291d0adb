"""Figures are kept, shared and renewed; probes of several processes come one after the other."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import StageError
from edgellm.probe import Conditions, DeviceFigures, Probed, device_figures, machine
from tests.conftest import ROOT

FIGURES = DeviceFigures(
    decode_bytes_per_s=1e10, prefill_flops_per_s=1e11, step_overhead_s=1e-4, threads=1
)


class FakeMeasure:
    """Stands for ``measure``: counts, and overlaps are seen."""

    def __init__(self) -> None:
        self.calls = 0
        self.running = 0
        self.age_s = 0.0
        self.spread = 0.0
        self.error: Exception | None = None

    async def __call__(self, folder: Path, *, threads: int, **_: Any) -> DeviceFigures:
        assert not self.running
        self.running += 1
        self.calls += 1
        await asyncio.sleep(0.02)
        self.running -= 1
        if self.error is not None:
            raise self.error
        now = time.time() - self.age_s
        return dataclasses.replace(FIGURES, threads=threads, measured_at=now, spread=self.spread)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def kept_in(folder: Path) -> Path:
    """The one file of figures there."""
    (path,) = folder.glob("*.json")
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> FakeMeasure:
    fake = FakeMeasure()
    monkeypatch.setattr(machine, "measure", fake)
    return fake


async def test_measured_once_then_kept(tmp_path: Path, measured: FakeMeasure) -> None:
    folder = tmp_path / "cache" / "probe"
    first = await device_figures(folder, threads=1)
    second = await device_figures(folder, threads=1)
    assert measured.calls == 1
    assert (first.cached, second.cached) == (False, True)
    assert first.figures is not None
    assert first.figures == second.figures
    assert (await device_figures(folder, threads=1, refresh=True)).cached is False
    assert measured.calls == 2


async def test_other_conditions_are_other_figures(
    tmp_path: Path, measured: FakeMeasure, monkeypatch: pytest.MonkeyPatch
) -> None:
    await device_figures(tmp_path, threads=1)
    await device_figures(tmp_path, threads=2)
    await device_figures(tmp_path, threads=1, pin=(0,))
    assert measured.calls == 3
    await device_figures(tmp_path, threads=1, pin=(1,))  # which processor makes no difference
    assert measured.calls == 3
    monkeypatch.setattr(machine, "read_conditions", lambda: Conditions(on_mains=False))
    await device_figures(tmp_path, threads=1)
    assert measured.calls == 4
    monkeypatch.setattr(machine, "engine_version", lambda: "9.9.9")
    await device_figures(tmp_path, threads=1)
    assert measured.calls == 5


@pytest.mark.parametrize(
    ("age_s", "spread", "kept"),
    [
        (29 * 86400, 0.0, True),
        (31 * 86400, 0.0, False),
        (1800, 0.9, True),
        (7200, 0.9, False),  # measured while the machine was busy
        (-7200, 0.0, False),  # from the future
    ],
)
async def test_figures_grow_old(
    tmp_path: Path, measured: FakeMeasure, age_s: float, spread: float, kept: bool
) -> None:
    measured.age_s, measured.spread = age_s, spread
    await device_figures(tmp_path, threads=1)
    assert (await device_figures(tmp_path, threads=1)).cached is kept


Spoil = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: None,
        lambda kept: [],
        lambda kept: {},
        lambda kept: kept | {"key": {}},
        lambda kept: kept | {"figures": []},
        lambda kept: kept | {"figures": {}},
        lambda kept: kept | {"figures": kept["figures"] | {"decode_bytes_per_s": -1}},
        lambda kept: kept | {"figures": kept["figures"] | {"measured_at": "yesterday"}},
    ],
)
async def test_a_spoilt_file_is_measured_anew(
    tmp_path: Path, measured: FakeMeasure, spoil: Spoil
) -> None:
    await device_figures(tmp_path, threads=1)
    path = kept_in(tmp_path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    assert not (await device_figures(tmp_path, threads=1)).cached
    assert (await device_figures(tmp_path, threads=1)).cached
    assert measured.calls == 2


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 60_000, b"9" * 60_000])
async def test_a_file_that_is_no_json_is_measured_anew(
    tmp_path: Path, measured: FakeMeasure, data: bytes
) -> None:
    await device_figures(tmp_path, threads=1)
    path = kept_in(tmp_path)
    path.write_bytes(data)
    assert not (await device_figures(tmp_path, threads=1)).cached


# --- reasons --------------------------------------------------------------------------


async def test_without_the_engine(
    tmp_path: Path, measured: FakeMeasure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "engine_version", lambda: None)
    found = await device_figures(tmp_path, threads=1)
    assert found.figures is None
    assert "not installed" in found.reason
    assert measured.calls == 0


async def test_a_failed_probe_is_a_reason_and_not_kept(
    tmp_path: Path, measured: FakeMeasure
) -> None:
    measured.error = StageError("the probe was aborted (SIGABRT).")
    found = await device_figures(tmp_path, threads=1)
    assert found == Probed(None, "the probe was aborted (SIGABRT).")
    measured.error = None
    assert (await device_figures(tmp_path, threads=1)).figures is not None


async def test_a_folder_that_cannot_be_used(tmp_path: Path, measured: FakeMeasure) -> None:
    (tmp_path / "file").write_text("")
    found = await device_figures(tmp_path / "file", threads=1)
    assert found.figures is None
    assert "cannot be used" in found.reason


async def test_others_that_never_end_are_not_waited_for_forever(
    tmp_path: Path, measured: FakeMeasure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_LOCK_WITHIN_S", 0.2)
    async with machine._turn(tmp_path):
        found = await device_figures(tmp_path, threads=1)
    assert "other nodes" in found.reason
    assert (await device_figures(tmp_path, threads=1)).figures is not None


def test_figures_or_a_reason() -> None:
    with pytest.raises(ValueError, match="either"):
        Probed(None)
    with pytest.raises(ValueError, match="either"):
        Probed(FIGURES, "why")


# --- several at once ------------------------------------------------------------------


async def test_several_nodes_of_one_process(tmp_path: Path, measured: FakeMeasure) -> None:
    found = await asyncio.gather(*(device_figures(tmp_path, threads=1) for _ in range(5)))
    assert measured.calls == 1
    assert len({each.figures for each in found}) == 1
    both = await asyncio.gather(
        *(device_figures(tmp_path, threads=1, refresh=True) for _ in range(2))
    )
    assert measured.calls == 2  # asked for at the same time: one answer is new enough for both
    assert both[0].figures == both[1].figures != found[0].figures


def start(source: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_several_processes_make_one_real_probe(tmp_path: Path) -> None:
    source = """
        import asyncio, json, pathlib, sys
        from edgellm.probe import device_figures
        from edgellm.probe.measure import Effort
        from edgellm.probe.synthetic import BlockShape

        async def main():
            found = await device_figures(
                pathlib.Path(sys.argv[1]),
                threads=1,
                effort=Effort(rounds=2, steps=4, chunks=1, disk_bytes=1 << 20),
                shape=BlockShape(512, 1536, 2),
            )
            print(json.dumps([found.cached, found.reason, found.figures.to_plain()]))

        asyncio.run(main())
    """
    processes = [start(source, tmp_path) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(cached for cached, _, _ in answers) == [False, True, True]
    assert answers[0][2] == answers[1][2] == answers[2][2]
    assert DeviceFigures.from_plain(answers[0][2]).complete
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json"]  # the lock, the file


async def test_a_killed_probe_gives_its_turn_back_and_is_tidied_up(
    tmp_path: Path, measured: FakeMeasure
) -> None:
    source = """
        import asyncio, pathlib, sys
        from edgellm.probe import machine

        async def hang(folder, **_):
            (folder / (machine.FOLDER_PREFIX + "left")).mkdir()
            (folder / (machine.FOLDER_PREFIX + "left") / "block").write_bytes(b"x")
            print("holds", flush=True)
            await asyncio.sleep(600)

        machine.measure = hang
        asyncio.run(machine.device_figures(pathlib.Path(sys.argv[1]), threads=1))
    """
    with start(source, tmp_path) as holder:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "holds\n"
        waiting = asyncio.create_task(device_figures(tmp_path, threads=1))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert measured.calls == 0
        holder.send_signal(signal.SIGKILL)
        found = await asyncio.wait_for(waiting, 10)
    assert found.figures is not None
    assert not found.cached
    assert {path.name for path in _entries(tmp_path)} == {"lock", kept_in(tmp_path).name}
