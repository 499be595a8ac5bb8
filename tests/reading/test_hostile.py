"""Damaged and hostile PDFs, images and texts neither crash nor hang, and each is reported.

By default a few of each. ``MMRAG_HOSTILE=full pytest -m slow -s tests/reading/test_hostile.py``
reads 1,000 PDFs, 500 images and 200 texts, and prints what became of them with the peak memory of
the program and of its workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hostile_files
import pytest

FULL = os.environ.get("MMRAG_HOSTILE") == "full"


def _read_all(kind: str, count: int, folder: Path, sources: list[Path] | None = None) -> Counter:
    """Read them in a process of their own: a peak covers all children that ended before."""
    script = hostile_files.__file__
    command = [sys.executable, script, kind, str(count), str(folder), *map(str, sources or [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    seen = json.loads(done.stdout)
    assert seen["peak_mib"]["workers"] < 2500
    counts = Counter(seen["counts"])
    assert counts.total() == count
    return counts


def _reports(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "reports").glob("*.pdf"))


def test_a_sample_of_damaged_files_is_reported(shared_data: Path, tmp_path: Path) -> None:
    counts = _read_all("pdf", 20, tmp_path, _reports(shared_data))
    assert counts["errors"] >= 3 and counts["both"] >= 3


@pytest.mark.parametrize(("kind", "count"), [("image", 24), ("text", 12)])
def test_a_sample_of_damaged_images_and_hostile_texts_is_reported(
    kind: str, count: int, tmp_path: Path
) -> None:
    _read_all(kind, count, tmp_path)


@pytest.mark.slow
def test_many_damaged_pdfs_are_reported(shared_data: Path, tmp_path: Path) -> None:
    sources = _reports(shared_data) + sorted((shared_data / "handbook" / "pdfs").glob("*.pdf"))
    _read_all("pdf", 1000 if FULL else 100, tmp_path, sources)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("image", 500), ("text", 200)])
def test_many_damaged_images_and_hostile_texts_are_reported(
    kind: str, count: int, tmp_path: Path
) -> None:
    _read_all(kind, count if FULL else count // 5, tmp_path)
