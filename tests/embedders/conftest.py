"""Tiny checkpoints shared by the tests of the engine."""

from pathlib import Path

import pytest
from tiny import save_qwen2_vl


@pytest.fixture(scope="session")
def qwen2_vl_folder(tmp_path_factory) -> Path:
    return save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl") / "tiny")


@pytest.fixture(scope="session")
def gme(qwen2_vl_folder):
    from mmrag.embedders import load_embedder

    return load_embedder(qwen2_vl_folder, family="gme", device="cpu", token_budget=1500)
