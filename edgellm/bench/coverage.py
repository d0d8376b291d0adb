"""How many of llama.cpp's architectures are cut exactly: a folder of tiny models, one by one.

Run as ``python -m edgellm.bench.coverage DIR``; docs/models.md says how to get such a folder. Each
model is checked in a process of its own, with a limit on its time: one that aborts or hangs is a
line of the table, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.bench.cutcheck import Verdict

WITHIN_S = 120.0
"""Longest time for one model. Most take two seconds."""
_KNOWN = (Verdict.EXACT, Verdict.SOLO, Verdict.REFUSED)
_ERROR_CHARACTERS = 160
_NUMBERS = (2, 3, 4)
"""Columns of the table that are numbers."""


@dataclass(frozen=True, slots=True)
class Line:
    """What came of one model, for the table."""

    name: str
    verdict: Verdict
    layers: int
    cuts: int
    """Boundaries at which it was cut."""
    moves: bool
    """Its sequences can move as KV pages; else they are computed again."""
    worst: float
    reason: str
    seconds: float


def check_file(path: Path, *, sabotage: bool, within_s: float = WITHIN_S) -> Line:
    """Check one model in a child; whatever happens there, a line comes back."""
    command = [sys.executable, "-m", "edgellm.bench.coverage_child", str(path)]
    command += ["--sabotage"] if sabotage else []
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired:
        return _failed(path, f"it took longer than {within_s:.0f} s", within_s)
    seconds = time.monotonic() - started
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
        return Line(
            name=path.stem,
            verdict=Verdict(found["verdict"]),
            layers=int(found["layers"]),
            cuts=len(found["boundaries"]),
            moves=bool(found["moves"]),
            worst=float(found["worst"]),
            reason=str(found["reason"]),
            seconds=seconds,
        )
    except (ValueError, KeyError, TypeError):
        return _failed(path, _last_words(done), seconds)


def _failed(path: Path, reason: str, seconds: float) -> Line:
    return Line(path.stem, Verdict.FAILED, 0, 0, False, 0.0, reason, seconds)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Why a child ended without an answer: its last line that says something."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "ASSERT" in line or "rror" in line]
    words = (told or lines or ["nothing was said"])[-1]
    return f"its process ended with status {done.returncode}: {words[:_ERROR_CHARACTERS]}"


def table(lines: Sequence[Line]) -> str:
    """The lines as text, one a model."""
    rows = [("model", "result", "layers", "cuts", "worst", "KV", "")]
    for line in lines:
        told = ("-", "-", "-")
        if line.cuts:
            worst = f"{line.worst:.1e}" if line.worst else "0"
            told = (str(line.cuts), worst, "moves" if line.moves else "again")
        rows.append((line.name, line.verdict.value, str(line.layers or "-"), *told, line.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, [*widths, 0], strict=True))
        ).rstrip()
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when every model did as its rule says (with ``--sabotage``: none passed)."""
    parser = argparse.ArgumentParser(
        prog="arch_coverage",
        description="Cut every tiny model of a folder at every legal boundary and compare its"
        " logits with the whole model's, bit for bit.",
    )
    parser.add_argument("folder", type=Path, help="a folder of .gguf files; see docs/models.md")
    parser.add_argument("--sabotage", action="store_true", help="cut wrongly: none may pass")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder.")
    paths = sorted(p for p in options.folder.glob("*.gguf") if options.only in p.stem)
    if not paths:
        parser.error(f"there is no such .gguf file in {options.folder}.")
    lines = []
    for number, path in enumerate(paths, 1):
        line = check_file(path, sabotage=options.sabotage)
        lines.append(line)
        took = f"{line.verdict} ({line.seconds:.1f} s)"
        sys.stderr.write(f"{number} of {len(paths)}: {line.name}: {took}\n")
    counts = Counter(line.verdict.value for line in lines).most_common()
    passed = sum(line.verdict is Verdict.EXACT for line in lines)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts)
    sys.stdout.write(f"{table(lines)}\n{summary}\npassed {passed} of {len(lines)}\n")
    if options.sabotage:
        return int(passed > 0)
    return int(any(line.verdict not in _KNOWN for line in lines))


if __name__ == "__main__":
    sys.exit(main())
