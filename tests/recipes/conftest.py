"""Rows of all modalities over a tiny model, for the tests of the recipes."""

from pathlib import Path

import pytest
from made_rows import make_rows
from tiny import save_qwen2_vl


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_qwen2_vl(tmp_path_factory.mktemp("train") / "tiny", seed=3)


@pytest.fixture(scope="session")
def mixed_rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("mixed"), 24, negatives=2)


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("text"), 16, kind="text")
