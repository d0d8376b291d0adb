"""What several unit tests of the store start from: a model with tensors of several pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.modelfile.model import Model
from tests.tensors import SPAN, Case, write_wide_model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_wide_model(tmp_path_factory.mktemp("wide") / "wide.gguf")


@pytest.fixture(scope="module")
def digests_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digests")


@pytest.fixture
def case(wide: Model, digests_folder: Path, tmp_path: Path) -> Case:
    return Case(wide, SPAN, digests_folder, tmp_path)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cache"
