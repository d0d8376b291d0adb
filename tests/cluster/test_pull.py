"""``pull``, ``rm`` and ``--model hf.co/...`` as real commands, against a hub on this machine."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import edgellm, finish, start, wait_for
from tests.cluster.terminal import Terminal
from tests.fakehub import BLOCK, FakeHub, fake_hub

pytest.importorskip("huggingface_hub")

REPO = "someone/story-GGUF"
NAME = f"hf.co/{REPO}"
FILE = "story-Q8_0.gguf"
ANSWER = ("--prompt", "What is edgellm?", "--temperature", "0", "--max-tokens", "8", "--json")


@pytest.fixture
def hub(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.add(REPO, {FILE: demo_model.read_bytes()})
        monkeypatch.setenv("HF_ENDPOINT", made.hub)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield made


def partial(tmp_path: Path) -> int:
    """Bytes of what is not finished."""
    return sum(path.stat().st_size for path in (tmp_path / "hub").rglob("*.incomplete"))


def test_a_model_by_its_name(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that needs it fetches it; then nobody is asked."""
    first = edgellm("chat", "--model", NAME, *ANSWER, temp=tmp_path)
    assert first.code == 0, first.err
    assert "hub: fetch" in first.err
    assert len(first.json["tokens"]) == 8
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = edgellm("chat", "--model", "story-gguf:q8_0", *ANSWER, temp=tmp_path)
    assert again.json["tokens"] == first.json["tokens"]
    assert not hub.requests


@pytest.mark.parametrize(
    "end", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_pull_that_was_ended_goes_on(end: signal.Signals, hub: FakeHub, tmp_path: Path) -> None:
    hub.hurry = threading.Event()
    process = start(("pull", NAME), tmp_path)
    wait_for(lambda: partial(tmp_path) >= BLOCK)
    process.send_signal(end)
    ended = finish(process)
    if end is signal.SIGINT:
        assert (ended.code, ended.err.splitlines()[-1]) == (130, "Stopped.")
    hub.hurry.set()
    held = partial(tmp_path)
    size = len(hub.repos[REPO][FILE])
    assert BLOCK <= held < size
    again = edgellm("pull", NAME, "--json", temp=tmp_path)
    assert again.code == 0, again.err
    assert (again.json["resumed_bytes"], again.json["fetched_bytes"]) == (held, size - held)


def test_at_a_terminal(hub: FakeHub, tmp_path: Path) -> None:
    """A bar that moves, and a question before anything is removed."""
    hub.hurry = threading.Event()
    with Terminal("pull", NAME, temp=tmp_path) as terminal:
        terminal.expect(" of 3.4 MiB")
        terminal.expect(" left")
        hub.hurry.set()
        terminal.expect(f"edgellm chat --model {NAME}")
        assert terminal.ended() == 0
    for answer, words in (("n", "Nothing was removed"), ("y", "are free again")):
        with Terminal("rm", NAME, temp=tmp_path) as terminal:
            terminal.expect("[y/N]")
            terminal.send(f"{answer}\n")
            terminal.expect(words)
            assert terminal.ended() == 0
