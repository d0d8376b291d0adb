"""Every kind of quantised weights and KV cells: stages compute the whole model's bits.

A llama of head size 64 (``tests/quantised.py``), in each of the eight usual quantisations and with
each usual KV type, over three stages of our engine in reference mode, compared with the whole model
straight on llama.cpp: a prompt of 16 tokens in two chunks and 8 decode steps, maximum difference 0.
Each comparison has a control that must differ: the later stages get their rows in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm.modelfile.gguf import read_header
from edgellm.types import KV_TYPES, EngineSettings
from tests.cutmodels import CHUNK, Calls, logits_of, open_cut, whole_calls
from tests.quantised import OTHERS, QUANTISATIONS, WEIGHTED, quantise, write_wide_llama
from tests.stages import settings_of

CUTS = ((0, 1), (1, 3), (3, 4))
KV_IDS = {"f16": 1, "q4_0": 2, "q8_0": 8}
"""``enum ggml_type``; not taken from the engine, which is what is tested."""
MIXTURES = {
    "Q4_0": {"q4_0"},
    "Q4_K_M": {"q4_K", "q6_K"},
    "Q5_K_M": {"q5_K", "q6_K"},
    "Q6_K": {"q6_K"},
    "Q8_0": {"q8_0"},
    "IQ4_XS": {"iq4_xs"},
    "F16": {"f16"},
    "BF16": {"bf16"},
}
"""Types that each file must hold: a quantizer that fell back to another would prove nothing."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    source = write_wide_llama(folder)
    return {"F32": source, **quantise(source, folder)}


def compare(
    path: Path,
    settings: EngineSettings,
    folder: Path,
    expected: Calls,
    cuts: Sequence[tuple[int, int]],
) -> None:
    with open_cut(path, cuts, settings, folder) as stages:
        got = logits_of(stages, expected.calls)
        stages.permute = True
        control = logits_of(stages, expected.calls[:1])
    for call, (mine, theirs) in enumerate(zip(got, expected.logits, strict=True)):
        assert np.array_equal(mine, theirs), f"call {call}: {np.abs(mine - theirs).max()}"
    assert not np.array_equal(control[0], expected.logits[0])


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_weights(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    held = {tensor.type.name for tensor in read_header(files[kind]).tensors}
    assert held >= MIXTURES[kind]
    expected = whole_calls(files[kind])
    compare(files[kind], settings_of(chunk=CHUNK), tmp_path, expected, CUTS)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ["Q4_K_M"])
def test_kv_types(kind: str, kv_type: str, files: dict[str, Path], tmp_path: Path) -> None:
    fields = {"type_k": KV_IDS[kv_type], "type_v": KV_IDS[kv_type]}
    expected = whole_calls(files[kind], fields=fields)
    compare(files[kind], settings_of(kv_type=kv_type, chunk=CHUNK), tmp_path, expected, CUTS)
    another = KV_IDS["f16" if kv_type == "q4_0" else "q4_0"]
    other = whole_calls(files[kind], fields={"type_k": another, "type_v": another})
    assert not np.array_equal(other.logits[-1], expected.logits[-1]), "the KV type does nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("kind", [*QUANTISATIONS, "F32"])
def test_every_pair_and_boundary(
    kind: str, kv_type: str, files: dict[str, Path], tmp_path: Path
) -> None:
    from edgellm.engine.bindings import KV_TYPE_IDS

    fields = {"type_k": KV_TYPE_IDS[kv_type], "type_v": KV_TYPE_IDS[kv_type]}
    expected = whole_calls(files[kind], fields=fields)
    for at in (1, 2, 3):
        cuts = ((0, at), (at, 4))
        compare(files[kind], settings_of(kv_type=kv_type, chunk=CHUNK), tmp_path, expected, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OTHERS, *WEIGHTED])
def test_everything_else_that_the_quantizer_makes(
    kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = quantise(files["F32"], tmp_path, [kind])[kind]
    compare(path, settings_of(chunk=CHUNK), tmp_path, whole_calls(path), CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tied", "experts"])
@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_tied_heads_and_experts(kind: str, shape: str, tmp_path: Path) -> None:
    source = write_wide_llama(tmp_path, tied=shape == "tied", experts=4 * (shape == "experts"))
    path = quantise(source, tmp_path, [kind])[kind]
    compare(path, settings_of(chunk=CHUNK), tmp_path, whole_calls(path), CUTS)
