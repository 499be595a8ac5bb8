"""Pages and texts for benchmarks, the same in every run."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from gpu_models import invented_words
from PIL import Image, ImageDraw, ImageFont

from mmrag.content import Content
from mmrag.modeling.batching import open_pool


def make_texts(count: int) -> list[str]:
    """Texts of 40 to 260 invented words."""
    chance = np.random.default_rng(1)
    words = invented_words()
    return [" ".join(chance.choice(words, int(n))) for n in chance.integers(40, 261, count)]


def save_pages(
    folder: Path, size: tuple[int, int], count: int, different: int = 32
) -> list[Content]:
    """Pages of text and a figure as PNG files, no two of the same bytes."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(2)
    words = invented_words()
    contents = [(" ".join(chance.choice(words, 600)), number) for number in range(different)]
    with open_pool(16, different) as pool:
        drawn = list(pool.map(lambda content: _page(size, *content), contents))
    pages = []
    for number in range(count):
        path = folder / f"{number:04}.png"
        path.write_bytes(_numbered(drawn[number % different], number))
        pages.append(Content(image=path))
    return pages


def _page(size: tuple[int, int], text: str, seed: int) -> bytes:
    """One page as PNG: lines of text, and a figure that does not compress well."""
    width, height = size
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(height // 70)
    words = text.split()
    for row in range(height // 50):
        line = " ".join(words[row * 11 : row * 11 + 11])
        draw.text((width // 12, height // 15 + row * height // 55), line, "black", font)
    chance = np.random.default_rng(seed)
    noise = chance.integers(0, 255, (height // 3 // 8, width // 2 // 8, 3), dtype=np.uint8)
    figure = Image.fromarray(noise).resize((width // 2, height // 3), Image.Resampling.BICUBIC)
    image.paste(figure, (width // 4, height * 3 // 5))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _numbered(png: bytes, number: int) -> bytes:
    """The same image with a comment, so that the file is another one."""
    chunk = b"tEXtComment\0" + str(number).encode()
    end = len(png) - 12  # the closing chunk
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:end] + framed + png[end:]
