"""Hostile names: whatever a peer, a file or a person calls things, no file outside a root opens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import ModelFileError, UsageError
from edgellm.modelref import open_reference
from tests.conftest import ROOT
from tests.hostilenames import NAMES, STEMS

HANG_S = 90.0


def witnessed(task: str, folder: Path) -> dict[str, Any]:
    """What a task of ``tests.hostilenames`` tells. Beside its root lies what must not be opened."""
    root = folder / "root"
    root.mkdir()
    for secret in (folder / "secret", folder / "secret.gguf"):
        secret.write_bytes(b"GGUF")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostilenames", task, str(root)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        cwd=root,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(told, dict)
    return told


def test_there_are_two_hundred_names() -> None:
    assert len(set(NAMES)) >= 200


def test_what_is_opened_outside_is_seen(tmp_path: Path) -> None:
    """Negative control: a careless use of the names."""
    seen = witnessed("careless", tmp_path)["seen"]
    assert len(seen) > 30
    assert any(path.endswith("/root/../secret") for event, path in seen if event == "open")


def test_names_in_requests_to_load_a_stage(tmp_path: Path) -> None:
    told = witnessed("load_requests", tmp_path)
    assert told["seen"] == []
    assert told["loaded"] == 0
    assert told["never sent"] + told["refused"] == 6 * len(NAMES)
    assert told["refused"] >= 2 * len(NAMES), "that many reached a node"


def test_names_where_digests_belong(tmp_path: Path) -> None:
    assert witnessed("digests", tmp_path) == {"seen": [], "sent": 0, "given": 0}


def test_names_of_devices(tmp_path: Path) -> None:
    told = witnessed("devices", tmp_path)
    assert told["seen"] == []
    assert told["refused"] >= len(NAMES), "no name is an id"


def test_names_inside_model_files(tmp_path: Path) -> None:
    told = witnessed("model_files", tmp_path)
    assert told["seen"] == []
    assert told["cut"] > len(STEMS) // 2


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_that_is_no_model_is_an_error_in_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a person may type after ``--model`` is opened as it stands, and refused as it should."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, ModelFileError)):
        open_reference(name)
