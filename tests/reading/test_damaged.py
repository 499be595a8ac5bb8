"""Damaged copies of real PDFs neither crash nor hang, and each is reported."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrag.errors import ReadError
from mmrag.reading import ReadOptions, read_file


def damaged_pdfs(sources: list[Path], count: int, seed: int = 20261121) -> Iterator[bytes]:
    """Copies that are cut off, have bytes flipped, objects cut out or parts zeroed, or two."""
    dice = random.Random(seed)
    ways = (_truncated, _flipped, _objects_cut, _zeroed)
    for i in range(count):
        data = sources[i % len(sources)].read_bytes()
        for way in dice.sample(ways, 1 if i % 3 else 2):
            data = way(data, dice)
        yield data


def _truncated(data: bytes, dice: random.Random) -> bytes:
    return data[: int(len(data) * dice.uniform(0.02, 0.98))]


def _flipped(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice((20, 200, 2000))):
        out[dice.randrange(len(out))] = dice.randrange(256)
    return bytes(out)


def _objects_cut(data: bytes, dice: random.Random) -> bytes:
    objects = list(re.finditer(rb"\d+ 0 obj.*?endobj", data, re.DOTALL))
    if not objects:
        return _truncated(data, dice)
    chosen = dice.sample(objects, max(1, int(len(objects) * dice.uniform(0.02, 0.4))))
    for match in sorted(chosen, key=lambda m: -m.start()):
        data = data[: match.start()] + data[match.end() :]
    return data


def _zeroed(data: bytes, dice: random.Random) -> bytes:
    size = int(len(data) * dice.uniform(0.01, 0.3))
    start = dice.randrange(max(1, len(data) - size))
    return data[:start] + bytes(size) + data[start + size :]


def _read_all(sources: list[Path], count: int, folder: Path) -> dict[str, int]:
    """How many files gave pages only, errors only, or both."""
    counts = {"pages": 0, "errors": 0, "both": 0}
    for i, data in enumerate(damaged_pdfs(sources, count)):
        path = folder / f"{i}.pdf"
        path.write_bytes(data)
        errors: list[ReadError] = []
        pages = list(read_file(path, folder / "img", ReadOptions(dpi=48), errors.append))
        assert pages or errors, f"nothing was said about {path}"
        assert all(error.file == path.as_posix() and error.args[0] for error in errors)
        for page in pages:
            assert page.nodes[0].metadata["page"] == page.page
            assert page.nodes[0].image_resource.path.is_file()
        counts["both" if pages and errors else "pages" if pages else "errors"] += 1
    return counts


def test_a_sample_of_damaged_files_is_reported(shared_data: Path, tmp_path: Path) -> None:
    counts = _read_all(sorted((shared_data / "reports").glob("*.pdf")), 20, tmp_path)
    assert counts["errors"] >= 3
    assert counts["both"] >= 3


@pytest.mark.slow
def test_two_hundred_damaged_files_are_reported(shared_data: Path, tmp_path: Path) -> None:
    sources = sorted((shared_data / "reports").glob("*.pdf"))
    sources += sorted((shared_data / "handbook" / "pdfs").glob("*.pdf"))
    assert sum(_read_all(sources, 200, tmp_path).values()) == 200
