"""Damaged and hostile files from a seed, read in a process of their own.

``python tests/hostile_files.py pdf|image|text COUNT FOLDER [SOURCE.pdf ...]`` prints as JSON how
many files gave pages, errors or both, and the peak memory of the program and of its workers in MiB.
"""

from __future__ import annotations

import io
import json
import random
import re
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmrag.errors import ReadError
from mmrag.reading import ReadOptions, client, read_file


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


def damaged_images(count: int, seed: int = 20261127) -> Iterator[tuple[str, bytes]]:
    """Images of all formats, damaged, or with a header that states another size."""
    dice = random.Random(seed)
    forms = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "bmp": "BMP"}
    forms |= {"webp": "WEBP", "avif": "AVIF", "jp2": "JPEG2000"}
    for i in range(count):
        suffix, form = list(forms.items())[i % len(forms)]
        image = Image.effect_noise((dice.randint(1, 400), dice.randint(1, 400)), 60)
        data = io.BytesIO()
        many = {"save_all": True, "append_images": [image] * 3} if form in ("TIFF", "GIF") else {}
        image.convert("RGB").save(data, form, **many)
        damage = dice.choice((_truncated, _flipped, _zeroed, _another_size))
        yield suffix, damage(data.getvalue(), dice)


def _another_size(data: bytes, dice: random.Random) -> bytes:
    """Bytes near the beginning, where formats keep width and height, set to large values."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 2, 4))):
        out[dice.randrange(min(len(out), 64))] = dice.choice((0, 0x7F, 0xFF))
    return bytes(out)


def hostile_texts(count: int, seed: int = 20261128) -> Iterator[bytes]:
    """Texts that make careless expressions backtrack, in any encoding, and random bytes."""
    dice = random.Random(seed)
    parts = (
        "# a",
        " ",
        "\t",
        "\n",
        " \n",
        "#",
        "`",
        "~~~",
        "*",
        "-",
        "1.",
        "(",
        "[",
        "]",
        '"',
        ".",
    )
    parts += ("\u3002", "\u4e00", "\u05d0", "\u0301", "\u00ad", "x", "é", "\ufeff", "\u202e")
    encodings = ("utf-8", "utf-16", "cp1252", "cp1251", "gb18030", "shift_jis", "utf-32")
    for i in range(count):
        if i % 5 == 0:
            yield dice.randbytes(dice.randint(1, 200_000))
            continue
        pieces = (dice.choice(parts) * dice.choice((1, 3, 10_000, 60_000)) for _ in range(6))
        yield "".join(pieces).encode(dice.choice(encodings), errors="replace")


def outcome(path: Path, folder: Path) -> str:
    """Read a file: whether it gave pages only, errors only, or both."""
    errors: list[ReadError] = []
    options = ReadOptions(dpi=48, page_seconds=30)
    pages = list(read_file(path, folder / "img", options, errors.append))
    assert pages or errors, f"nothing was said about {path}"
    assert all(error.file == path.as_posix() and error.args[0] for error in errors)
    for page in pages:
        for node in page.nodes:
            image = node.metadata.get("page_image")
            assert image is None or Path(image).is_file()
    return "both" if pages and errors else "pages" if pages else "errors"


def main(kind: str, count: int, folder: Path, sources: list[Path]) -> None:
    files: Iterator[tuple[str, bytes]] = {
        "pdf": lambda: (("pdf", data) for data in damaged_pdfs(sources, count)),
        "image": lambda: damaged_images(count),
        "text": lambda: (("md", data) for data in hostile_texts(count)),
    }[kind]()
    counts: Counter[str] = Counter()
    for i, (suffix, data) in enumerate(files):
        path = folder / f"{i}.{suffix}"
        path.write_bytes(data)
        counts[outcome(path, folder)] += 1
        path.unlink()
    client.close_workers()  # so that they are counted among the children that have ended
    peaks = {
        name: resource.getrusage(who).ru_maxrss // 1024
        for name, who in (("program", resource.RUSAGE_SELF), ("workers", resource.RUSAGE_CHILDREN))
    }
    print(json.dumps({"counts": counts, "peak_mib": peaks}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
