"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from tiny import save_qwen2_vl

SHARED = Path(os.environ.get("MMRAG_TEST_DATA", Path(__file__).parents[2] / "shared"))

# Haystack reads it when it is imported: tests send no telemetry.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"evaluation data is not here: {name} (set MMRAG_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the vectors of the reference code of each family."""
    return _folder("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real documents and questions."""
    return _folder("data")


@pytest.fixture(scope="session")
def qwen2_vl_folder(tmp_path_factory) -> Path:
    return save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl") / "tiny")


@pytest.fixture(scope="session")
def gme(qwen2_vl_folder):
    from mmrag.embedders import load_embedder

    return load_embedder(qwen2_vl_folder, family="gme", device="cpu", token_budget=1500)


@pytest.fixture(autouse=True)
def no_recognition(request, monkeypatch):
    """Recognition takes seconds a page: only tests marked ``ocr`` have it."""
    from mmrag.reading import ocr

    if "ocr" not in request.keywords:
        monkeypatch.setattr(ocr, "available", lambda: False)
    elif not ocr.available():
        pytest.skip("needs the ocr extra")
