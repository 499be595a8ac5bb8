"""Finding a quote on a page, and marking boxes on its image."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher

from PIL import Image, ImageChops, ImageDraw

from mmrag.reading.boxes import union
from mmrag.reading.characters import clean
from mmrag.reading.layout import Token
from mmrag.reading.options import Box

_MARK = (255, 214, 0)
_FRAME = (222, 120, 0)
_ELLIPSIS = re.compile(r"\[?(?:\.{3,}|\u2026)\]?")


def find_quote(tokens: Sequence[Token], quote: str) -> list[Box]:
    """Boxes of a quote, one a line, in the order of the text; empty if it is not there.

    Case, spaces, punctuation and hyphenation do not count. A quote with "..." is found part by
    part. A quote that is not there word for word is found by its longest run of words, if that
    is at least five words and half of the quote.
    """
    # Letters and digits in one string, since spaces and hyphens differ between quote and page.
    plain = [_plain(token.text) for token in tokens]
    letters = "".join(plain)
    owners = [i for i, text in enumerate(plain) for _ in text]
    boxes: list[Box] = []
    for part in _ELLIPSIS.split(clean(quote)):
        wanted = _plain(part)
        if not wanted:
            continue
        at = letters.find(wanted)
        if at >= 0:
            boxes += _line_boxes(tokens, owners[at], owners[at + len(wanted) - 1])
    return boxes or _longest_match(tokens, quote)


def _plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _longest_match(tokens: Sequence[Token], quote: str, least: int = 5) -> list[Box]:
    words = [plain for word in clean(quote).split() if (plain := _plain(word))]
    there = [_plain(token.text) for token in tokens]
    # autojunk would drop words that are frequent on a long page.
    match = SequenceMatcher(None, there, words, autojunk=False).find_longest_match()
    if match.size < max(least, len(words) / 2):
        return []
    return _line_boxes(tokens, match.a, match.a + match.size - 1)


def _line_boxes(tokens: Sequence[Token], first: int, last: int) -> list[Box]:
    """One box for each line that the tokens from first to last stand on."""
    lines: list[list[Box]] = []
    for token in tokens[first : last + 1]:
        if lines and _same_line(lines[-1][-1], token.box):
            lines[-1].append(token.box)
        else:
            lines.append([token.box])
    return [union(line) for line in lines]


def _same_line(one: Box, other: Box) -> bool:
    """Side by side and not in different columns; or end to end, where text runs along the page."""
    width = max(one[2] - one[0], other[2] - other[0])
    height = max(one[3] - one[1], other[3] - other[1])
    across = min(one[2], other[2]) - max(one[0], other[0])  # negative: how far apart
    along = min(one[3], other[3]) - max(one[1], other[1])
    upright = along > 0.5 * height and -across < 3 * height
    return upright or (across > 0.8 * width and -along < width < height)


def mark_boxes(png: bytes, boxes: Sequence[Box], scale: float) -> bytes:
    """The image as PNG with boxes (in points, times ``scale`` in pixels) highlighted."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    pen = Image.new("RGB", image.size, (255, 255, 255))
    draw = ImageDraw.Draw(pen)
    frames = []
    for box in boxes:
        x0, y0, x1, y1 = (value * scale for value in box)
        frame = (x0 - 2, y0 - 2, x1 + 2, y1 + 2)
        frames.append(frame)
        draw.rectangle(frame, fill=_MARK)
    # Multiplied, as a highlighter does: black text stays black under the colour.
    marked = ImageChops.multiply(image, pen)
    draw = ImageDraw.Draw(marked)
    for frame in frames:
        draw.rectangle(frame, outline=_FRAME, width=max(1, round(scale)))
    out = io.BytesIO()
    marked.save(out, "PNG")
    return out.getvalue()
