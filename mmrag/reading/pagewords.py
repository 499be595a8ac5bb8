"""The words of a page with their boxes, kept beside the page's image.

With them a quote is located without the original file, in the collection's folder wherever it
is. Format: gzipped JSON ``{"version": 1, "scale": pixels of the image per unit, "words": [[text,
gap before it, x0, y0, x1, y1], ...]}``; boxes in points of a PDF page as it is shown, or in pixels
of an image file.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from mmrag.reading.files import write
from mmrag.reading.layout import Token

_VERSION = 1


@dataclass(frozen=True, slots=True)
class PageWords:
    """The tokens of a page in reading order. scale: pixels of its image per unit of the boxes."""

    tokens: list[Token]
    scale: float


def words_path(image: Path) -> Path:
    """Where the words of a page are kept, by the path of its image."""
    return image.with_suffix(".words.json.gz")


def save_words(image: Path, words: PageWords) -> None:
    """Keep the words of a page beside its image."""
    rows = [
        # A tenth of a point is less than a pixel at 144 dpi.
        [token.text, token.gap, *(round(value, 1) for value in token.box)]
        for token in words.tokens
    ]
    content = {"version": _VERSION, "scale": words.scale, "words": rows}
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    # Without the time, equal pages give equal files.
    write(words_path(image), gzip.compress(data, compresslevel=6, mtime=0))


def load_words(image: Path) -> PageWords | None:
    """The words of a page by the path of its image.

    None where there are none that this version reads: the page was indexed by an earlier one,
    or the file is damaged.
    """
    try:
        content = json.loads(gzip.decompress(words_path(image).read_bytes()))
        if content["version"] != _VERSION:
            return None
        tokens = [
            Token(text, (x0, y0, x1, y1), gap) for text, gap, x0, y0, x1, y1 in content["words"]
        ]
        return PageWords(tokens, float(content["scale"]))
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return None
