"""A device as ``edgellm join`` runs it, and what it says: for the cluster tests."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.processes import end_tree, environment, wait_for


@dataclass
class Joined:
    """A node that runs, and what it has said."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def address(self) -> str:
        return str(json.loads(self.out.read_bytes())["address"])

    def said(self) -> str:
        return self.err.read_text(encoding="utf-8")


@contextlib.contextmanager
def joined(folder: Path, home: str, env: dict[str, str], *options: str) -> Iterator[Joined]:
    """``edgellm join`` with a home below ``folder``, until the end of the block."""
    count = len(list(folder.glob(f"{home}.*.out")))
    out, err = folder / f"{home}.{count}.out", folder / f"{home}.{count}.err"
    command = [
        sys.executable, "-m", "edgellm", "join", "--json", "--home", str(folder / home),
        *(() if "--name" in options else ("--name", home)), *options,
    ]  # fmt: skip
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
            env=environment(folder) | env, cwd=folder,
        )  # fmt: skip
    made = Joined(process, out, err)
    try:
        wait_for(lambda: process.poll() is not None or out.read_bytes().endswith(b"\n"))
        assert process.poll() is None, made.said()
        yield made
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            end_tree(process.pid)
        process.wait()
        assert "Traceback" not in made.said(), made.said()
