"""`scripts/arch_coverage` on tiny models that the tests make: what it checks, and that it can fail.

The product's cutter and engine against plain llama.cpp, bit for bit, with controls; most of them
in this process, since what it loads is known to load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgellm.bench import coverage
from edgellm.bench.coverage import Line, check_file
from edgellm.bench.cutcheck import Verdict, check_model
from edgellm.bench.deeper import write_deeper
from edgellm.modelfile import open_model, read_card
from edgellm.modelfile.architectures import ARCHITECTURES, ArchitectureRule, Support
from edgellm.modelfile.metadata import meta_per_layer
from tests.tinyarchs import TINY_ARCHS
from tests.tinymodels import write_recipe, write_tiny_model

COMPUTED_AGAIN = ("deepseek4",)
"""The layout of their memory is not known."""


@pytest.mark.parametrize("name", sorted(TINY_ARCHS))
def test_every_boundary_is_exact(name: str, model_dir: Path, tmp_path: Path) -> None:
    found = check_model(write_recipe(TINY_ARCHS[name], model_dir), tmp_path)
    assert (found.verdict, found.worst) == (Verdict.EXACT, 0.0), found
    assert found.boundaries
    assert found.moves is (name not in COMPUTED_AGAIN)


@pytest.mark.parametrize("name", ["cogvlm", "deepseek4", "gpt2", "nemotron_h"])
def test_a_wrong_cut_is_noticed(name: str, model_dir: Path, tmp_path: Path) -> None:
    found = check_model(write_recipe(TINY_ARCHS[name], model_dir), tmp_path, sabotage=True)
    assert found.verdict is Verdict.DIFFERS
    assert found.worst > 0


def test_a_model_that_is_too_shallow_is_made_deeper(tmp_path: Path) -> None:
    """A hybrid of two layers can be cut nowhere: both parts need both kinds."""
    shallow = write_tiny_model("qwen35", tmp_path, layers=2)
    assert read_card(open_model(shallow)).boundaries == ()
    found = check_model(shallow, tmp_path)
    assert (found.verdict, found.layers, found.boundaries) == (Verdict.EXACT, 4, (2,)), found


def test_a_deeper_model_has_other_layers_of_the_same_kinds(tmp_path: Path) -> None:
    model = open_model(write_tiny_model("lfm2", tmp_path, layers=2))
    write_deeper(model, 3, tmp_path / "deeper.gguf")
    deeper = open_model(tmp_path / "deeper.gguf")
    assert deeper.layers == 6
    heads = meta_per_layer(deeper.metadata, "lfm2.attention.head_count_kv", 6)
    assert heads == [0, 2, 0, 2, 0, 2]
    names = {name.split(".", 2)[2] for name in deeper.tensors if name.startswith("blk.5.")}
    assert names == {name.split(".", 2)[2] for name in model.tensors if name.startswith("blk.1.")}
    weights = [
        np.frombuffer(deeper.read(f"blk.{i}.ffn_up.weight"), np.float32) for i in range(1, 6, 2)
    ]
    assert not np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[1], weights[2])
    assert np.array_equal(np.sort(weights[0]), np.sort(weights[1]))


def test_what_cannot_be_cut_runs_whole(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the only stage it gives the bits of llama.cpp alone, and the reason is told."""
    rule = ArchitectureRule(Support.SOLO, "its layers hold hands")
    monkeypatch.setitem(ARCHITECTURES, "gpt2", rule)
    found = check_model(write_recipe(TINY_ARCHS["gpt2"], model_dir), tmp_path)
    assert (found.verdict, found.boundaries, found.worst) == (Verdict.SOLO, (), 0.0)
    assert "hold hands" in found.reason


def test_a_model_in_a_child(model_dir: Path) -> None:
    line = check_file(write_recipe(TINY_ARCHS["bloom"], model_dir), sabotage=False)
    assert (line.verdict, line.layers, line.cuts, line.worst) == (Verdict.EXACT, 3, 2, 0.0), line


def test_a_model_that_does_not_load_is_a_line(tmp_path: Path) -> None:
    """A llama's tensors are no RWKV's: llama.cpp refuses, and says which it misses."""
    path = write_tiny_model("llama", tmp_path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"rwkv6"))  # as long, so nothing moves
    line = check_file(path, sabotage=False)
    assert line.verdict is Verdict.FAILED
    assert "rwkv6" in line.reason


def test_a_child_that_takes_too_long_is_a_line(model_dir: Path) -> None:
    path = write_recipe(TINY_ARCHS["bloom"], model_dir)
    line = check_file(path, sabotage=False, within_s=0.01)
    assert line.verdict is Verdict.FAILED
    assert "longer" in line.reason


def lines(*verdicts: Verdict) -> Callable[..., Line]:
    """A stand-in for ``check_file`` that finds these, one after the other."""
    found = iter(verdicts)

    def check(path: Path, *, sabotage: bool) -> Line:
        del sabotage
        return Line(path.stem, next(found), 2, 1, True, 0.0, "", 0.1)

    return check


@pytest.mark.parametrize(
    ("verdicts", "options", "last", "status"),
    [
        ((Verdict.EXACT, Verdict.SOLO), (), "passed 1 of 2", 0),
        ((Verdict.EXACT, Verdict.BLIND), (), "passed 1 of 2", 1),
        ((Verdict.REFUSED, Verdict.FAILED), (), "passed 0 of 2", 1),
        ((Verdict.DIFFERS, Verdict.FAILED), ("--sabotage",), "passed 0 of 2", 0),
        ((Verdict.EXACT, Verdict.DIFFERS), ("--sabotage",), "passed 1 of 2", 1),
    ],
)
def test_the_last_line_says_how_many_passed(
    verdicts: tuple[Verdict, ...],
    options: tuple[str, ...],
    last: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(len(verdicts)):
        (tmp_path / f"m{number}.gguf").touch()
    monkeypatch.setattr(coverage, "check_file", lines(*verdicts))
    assert coverage.main([str(tmp_path), *options]) == status
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == last
    assert [line.split()[1] for line in printed[1:3]] == [v.value for v in verdicts]
