"""LoRA adapters, cut with their layers: stages compute what the whole model does with the same.

The whole model runs straight on llama.cpp with the adapter's own file; each stage of our engine in
reference mode loads the part of it that belongs to its layers. Maximum difference 0; without the
adapter, and with another scale, the logits must differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm.errors import StageError
from edgellm.modelfile import read_card
from edgellm.modelfile.gguf import read_header
from tests.cutmodels import CHUNK, logits_of, open_cut, whole_calls
from tests.quantised import quantise, write_wide_llama
from tests.stages import settings_of
from tests.tinyadapters import write_adapter
from tests.tinymodels import TINY_MODELS, write_tiny_model

CUTS = ((0, 1), (1, 3), (3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    source = write_wide_llama(folder)
    return quantise(source, folder, ["Q4_K_M"])["Q4_K_M"]


def compare(
    path: Path,
    adapters: Sequence[tuple[Path, float]],
    folder: Path,
    cuts: Sequence[tuple[int, int]] = CUTS,
) -> None:
    settings = settings_of(chunk=CHUNK)
    expected = whole_calls(path, adapters=adapters)
    with open_cut(path, cuts, settings, folder, adapters) as stages:
        got = logits_of(stages, expected.calls)
    for call, (mine, theirs) in enumerate(zip(got, expected.logits, strict=True)):
        assert np.array_equal(mine, theirs), f"call {call}: {np.abs(mine - theirs).max()}"
    others = [[], [(adapter, scale / 2) for adapter, scale in adapters]]
    for other in others:
        with open_cut(path, cuts, settings, folder, other) as stages:
            control = logits_of(stages, expected.calls[:1])
        assert not np.array_equal(control[0], expected.logits[0]), "the adapter does nothing"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_an_adapter_of_layers_and_head(kind: str, base: Path, folder: Path, tmp_path: Path) -> None:
    rank = 32 if kind == "Q8_0" else 8
    adapter = write_adapter(base, folder / f"{kind}.gguf", kind=kind, rank=rank, outer=["output"])
    compare(base, [(adapter, 1.0)], tmp_path)


def test_two_adapters_with_scales(base: Path, folder: Path, tmp_path: Path) -> None:
    """One of all layers and one of the last only: some stages load one, some both."""
    one = write_adapter(base, folder / "one.gguf", alpha=None)
    two = write_adapter(base, folder / "two.gguf", layers=[3], names=["attn_q"], alpha=4.0)
    compare(base, [(one, 0.75), (two, -1.5)], tmp_path)
    # Each stage has its own part and no more.
    told = read_header(tmp_path / "0-1-lora0.gguf")
    assert {info.name.split(".")[1] for info in told.tensors} == {"0"}
    assert not (tmp_path / "0-1-lora1.gguf").exists()
    assert len(read_header(tmp_path / "3-4-lora1.gguf").tensors) == 2


def test_experts_of_a_mixture(folder: Path, tmp_path: Path) -> None:
    base = write_wide_llama(folder, experts=4)
    adapter = write_adapter(base, folder / "experts.gguf")
    compare(base, [(adapter, 1.0)], tmp_path)


@pytest.mark.parametrize("cuts", [((0, 4),), CUTS])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_token_embeddings(
    kind: str, cuts: Sequence[tuple[int, int]], base: Path, folder: Path, tmp_path: Path
) -> None:
    """Whole, llama.cpp looks them up; the first of several stages does it beside it."""
    adapter = write_adapter(
        base, folder / f"embedding-{kind}.gguf", names=[], outer=["token_embd"], kind=kind, rank=32
    )
    compare(base, [(adapter, 0.7)], tmp_path, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_every_architecture(name: str, folder: Path, tmp_path: Path) -> None:
    """All matrices of all layers; what llama.cpp does not multiply by itself it leaves alone."""
    base = write_tiny_model(name, folder)
    card = read_card(base)
    names = {
        info.name.split(".")[2]
        for info in read_header(base).tensors
        if info.name.startswith("blk.") and len(info.shape) > 1 and "conv" not in info.name
    }
    architecture = TINY_MODELS[name].architecture
    adapter = write_adapter(
        base, folder / f"{name}-lora.gguf", names=sorted(names), architecture=architecture
    )
    middle = card.boundaries[len(card.boundaries) // 2]
    compare(base, [(adapter, 1.0)], tmp_path, ((0, middle), (middle, card.n_layers)))


def test_an_adapter_that_llama_cpp_refuses_is_a_typed_error(base: Path, tmp_path: Path) -> None:
    """It never comes so far: files are validated first. But should it, a stage says so."""
    settings = settings_of(chunk=CHUNK)
    broken = write_adapter(base, tmp_path / "broken.gguf", architecture="qwen2")
    with (
        pytest.raises(StageError, match="refused an adapter"),
        open_cut(base, [(0, 4)], settings, tmp_path, [(broken, 1.0)], checked=False),
    ):
        pass
