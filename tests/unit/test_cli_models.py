"""``pull``, ``list`` and ``rm``: what they print, and how they end. In this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgellm.cli.app import app_of
from tests.fakehub import FakeHub, fake_hub

pytest.importorskip("huggingface_hub")

REPO = "someone/story-GGUF"
NAME = f"hf.co/{REPO}"
FILE = "story-Q8_0.gguf"


@pytest.fixture
def hub(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.add(REPO, {FILE: demo_model.read_bytes()})
        monkeypatch.setenv("HF_ENDPOINT", made.hub)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield made


def said(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command."""
    done = CliRunner().invoke(app_of((arguments[0],)), list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def told(*arguments: str, code: int = 0) -> dict[str, Any]:
    """The one object of a command."""
    made = json.loads(said(*arguments, "--json", code=code)[0])
    assert isinstance(made, dict)
    return made


def test_a_model_comes_is_listed_and_goes(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, demo_model: Path
) -> None:
    size = demo_model.stat().st_size
    pulled = told("pull", NAME)
    assert pulled["checked"] is True
    assert pulled["fetched_bytes"] == size
    assert pulled["commit"] == hub.commit(REPO)
    listed = {model["name"]: model for model in told("list")["models"]}
    model = listed[f"{NAME}:Q8_0"]
    assert model == pulled["model"]
    assert (model["architecture"], model["layers"], model["bytes"]) == ("llama", 8, size)
    assert (model["quantisation"], model["where"]) == ("q8_0", "hugging face cache")
    assert Path(model["path"]).read_bytes() == demo_model.read_bytes()
    assert listed["edgellm-demo"]["where"] == "bundled"
    shown, _ = said("list")
    assert f"{NAME}:Q8_0" in shown
    # the hub is asked again, and nothing comes
    assert told("pull", NAME)["fetched_bytes"] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert told("pull", NAME)["checked"] is False
    assert not hub.requests
    error = told("rm", NAME, code=2)["error"]
    assert "nobody is there to be asked" in error["message"]
    removed = told("rm", NAME, "--yes")
    assert removed["removed"] == f"{NAME}:Q8_0"
    assert size <= removed["freed_bytes"] < size + 100
    assert [model["name"] for model in told("list")["models"]] == ["edgellm-demo"]


def test_a_hub_that_is_gone_takes_nothing_away(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    said("pull", NAME)
    hub.status = 503
    out, err = said("pull", NAME)
    assert not out
    assert f"busy (status 503); {NAME}:Q8_0 is here already" in err


def test_what_is_not_finished_is_shown_and_can_be_removed(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.store.hublibrary.RETRIES", 0)
    hub.cuts = [100_000]
    told("pull", NAME, code=4)
    assert told("list")["unfinished"] == [{"name": NAME, "bytes": 100_000}]
    assert f"of {NAME}. edgellm pull goes on" in said("list")[1]
    assert told("rm", NAME, "--yes") == {"removed": NAME, "freed_bytes": 100_000}
    assert told("list")["unfinished"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("pull", f"{NAME}:Q2_K"), 2, "It has: Q8_0"),
        (("pull", "hf.co/x/y"), 2, "or it is private"),
        (("pull", "story.gguf"), 2, "is no model on the hub"),
        (("rm", NAME, "--yes"), 2, "here to be removed"),
        (("rm", "../story.gguf", "--yes"), 2, "here to be removed"),
        (("rm", "edgellm-demo", "--yes"), 2, "stays"),
    ],
)
def test_what_goes_wrong_is_said(
    arguments: tuple[str, ...], code: int, words: str, hub: FakeHub
) -> None:
    error = told(*arguments, code=code)["error"]
    assert words in error["message"]
    assert error["exit_code"] == code
