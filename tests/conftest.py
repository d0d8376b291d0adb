"""What every test may ask for: where models are, and a guard that keeps pure code pure.

This file may not start processes or load a model; tests do that themselves.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The bundled model; the project is not whole without it, so a missing one is a failure."""
    path = ROOT / "models" / "edgellm-demo.gguf"
    if not path.is_file():
        pytest.fail(f"{path} is missing; scripts/train_demo_model.py makes it")
    return path


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of test models that are not part of the project; the test is skipped without it.

    ``EDGELLM_TEST_MODELS`` names it; the default lies beside the checkout.
    """
    named = os.environ.get("EDGELLM_TEST_MODELS")
    folder = Path(named) if named else ROOT.parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip(f"no test models in {folder}; set EDGELLM_TEST_MODELS to their folder")
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models that tests write, shared by the whole run so that each is made once."""
    return tmp_path_factory.mktemp("models")


class ImpureError(AssertionError):
    """Code that promised to be pure used a socket, slept, or read a clock."""


@pytest.fixture
def pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of the test: sockets and sleeping raise, and so do clocks read by edgellm.

    Clocks keep working for everyone else, because pytest and hypothesis time the tests themselves.
    """

    def forbid(name: str) -> Callable[..., NoReturn]:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise ImpureError(f"pure code called {name}")

        return refuse

    def guard_clock(name: str, clock: Callable[[], float]) -> Callable[[], float]:
        def read() -> float:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("edgellm."):
                raise ImpureError(f"pure code read {name}; time is an argument")
            return clock()

        return read

    for name in ("socket", "socketpair", "create_connection", "create_server", "getaddrinfo"):
        monkeypatch.setattr(socket, name, forbid(f"socket.{name}"))
    monkeypatch.setattr(time, "sleep", forbid("time.sleep"))
    monkeypatch.setattr(asyncio, "sleep", forbid("asyncio.sleep"))
    for name in ("time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns"):
        monkeypatch.setattr(time, name, guard_clock(f"time.{name}", getattr(time, name)))


@pytest.fixture(autouse=True)
def _pure_where_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """``@pytest.mark.pure`` (or a module's ``pytestmark``) is the ``pure`` fixture."""
    if request.node.get_closest_marker("pure") is not None:
        request.getfixturevalue("pure")
    yield
