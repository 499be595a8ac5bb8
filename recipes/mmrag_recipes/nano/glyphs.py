"""Crops of rendered text with the box of every character, and what a tower should see in them."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mmrag_recipes.nano.grams import trigrams

CLASSES = " abcdefghijklmnopqrstuvwxyz0123456789."  # first: nothing; last: any other mark
TOKEN = 28  # pixels: side of a visual token
PATCH = 14
PROBE = 7  # pixels: a character is asked for at the centre of each such cell
_OVERSAMPLE = 2
_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Glyph:
    """A character on a crop: its box in pixels, its class and the trigram around it."""

    left: float
    right: float
    top: float
    bottom: float
    kind: int
    gram: str | None


@dataclass(frozen=True)
class Layout:
    """How words are set: sizes and offsets in pixels, colours from 0 to 255.

    columns: distance of the columns that words are set in, as in a table; 0 for running text.
    """

    font: str
    size: float
    leading: float
    x: float
    y: float
    ink: int
    paper: int
    columns: float = 0.0


def find_fonts(folders: Sequence[str], faces: Sequence[str] = ("",)) -> list[str]:
    """Font files below ``folders`` whose names begin like one of ``faces``."""
    files = [p for folder in folders for p in Path(folder).rglob("*.[to]tf")]
    return sorted(str(p) for p in files if p.name.startswith(tuple(faces)))


def random_layout(fonts: Sequence[str], rng: random.Random) -> Layout:
    """Mostly the body text of a page scaled to 1280 visual tokens: 14 to 18 pixels an em."""
    dark, light = rng.randint(0, 60), rng.choice([255, 255, rng.randint(225, 255)])
    inverted = rng.random() < 0.02
    return Layout(
        font=rng.choice(fonts),
        size=rng.randint(14, 18) if rng.random() < 0.9 else rng.randint(12, 24),
        leading=rng.uniform(1.15, 1.4),
        x=rng.uniform(-20, 20),
        y=rng.uniform(-12, 6),
        ink=light if inverted else dark,
        paper=dark if inverted else light,
        columns=rng.uniform(40, 150) if rng.random() < 0.15 else 0.0,
    )


def render(
    words: Sequence[str], width: int, height: int, layout: Layout, rng: random.Random
) -> tuple[Image.Image, list[Glyph]]:
    """Set ``words`` in lines that run over the right edge, until the crop is full.

    Tables get rules between their lines, half of the time.

    ``rng`` picks the filter that scales the picture down, as programs differ in theirs.
    """
    size = int(layout.size * _OVERSAMPLE)
    font = _font(layout.font, size)
    ascent, descent = font.getmetrics()
    picture = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE), layout.paper)
    draw = ImageDraw.Draw(picture)
    glyphs: list[Glyph] = []
    x, y = layout.x * _OVERSAMPLE, layout.y * _OVERSAMPLE
    ruled = layout.columns > 0 and rng.random() < 0.5
    for word in words:
        if x >= picture.width:
            x, y = layout.x * _OVERSAMPLE, y + size * layout.leading
            if ruled:
                draw.line((0, y, picture.width, y), fill=layout.ink, width=_OVERSAMPLE)
        if y >= picture.height:
            break
        draw.text((x, y), word, font=font, fill=layout.ink)
        for character, gram in zip(word, trigrams(word), strict=True):
            wide = _advance(layout.font, size, character)
            box = (x, x + wide, y + 0.15 * ascent, y + ascent + 0.7 * descent)
            left, right, top, bottom = (value / _OVERSAMPLE for value in box)
            glyphs.append(Glyph(left, right, top, bottom, kind_of(character), gram))
            x += wide
        x = _next_word(x + _advance(layout.font, size, " "), layout)
    return picture.resize((width, height), rng.choice(_FILTERS)), glyphs


def _next_word(x: float, layout: Layout) -> float:
    """Where the next word starts: here, or at the next column."""
    if not layout.columns:
        return x
    first, step = layout.x * _OVERSAMPLE, layout.columns * _OVERSAMPLE
    return first + math.ceil((x - first) / step) * step


def clear_edge(
    picture: Image.Image, glyphs: list[Glyph], paper: int, rng: random.Random
) -> tuple[Image.Image, list[Glyph]]:
    """In six of ten crops, empty a random share at one edge; in one of these five, draw bars there.

    Most of a page is empty. A tower that never saw that puts out a little for each empty token,
    and over a page those sum up to more than the text.
    """
    width, height = picture.size
    box = [0, 0, width, height]
    edge = rng.choices([None, 3, 2, 1, 0], [0.4, 0.25, 0.15, 0.1, 0.1])[0]
    if edge is None:
        return picture, glyphs
    box[edge] = rng.randint(0, height if edge % 2 else width)
    left, top, right, bottom = box
    cleared = Image.new("L", (width, height), paper)
    if rng.random() < 0.2:
        _draw_bars(cleared, rng)
    if left < right and top < bottom:
        cleared.paste(picture.crop((left, top, right, bottom)), (left, top))
    kept = [
        g
        for g in glyphs
        if left <= (g.left + g.right) / 2 < right and top <= (g.top + g.bottom) / 2 < bottom
    ]
    return cleared, kept


def _draw_bars(picture: Image.Image, rng: random.Random) -> None:
    """The bars of a chart: ink that is not text."""
    draw = ImageDraw.Draw(picture)
    wide, x = rng.randint(5, 40), rng.randint(-20, 20)
    while x < picture.width:
        top = rng.randint(0, picture.height)
        draw.rectangle((x, top, x + wide, picture.height), fill=rng.randint(0, 220))
        x += wide + rng.randint(1, 30)


def kind_of(character: str) -> int:
    """Class of a character: case is not told apart."""
    found = CLASSES.find(character.lower())
    return found if found > 0 else len(CLASSES) - 1


@functools.lru_cache(maxsize=4096)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1 << 18)
def _advance(path: str, size: int, character: str) -> float:
    return _font(path, size).getlength(character)


def probe_classes(glyphs: Sequence[Glyph], width: int, height: int) -> NDArray[np.int64]:
    """Class under the four probes of each patch, (patches, 4), patches in the merger's order."""
    cells = np.zeros((height // PROBE, width // PROBE), dtype=np.int64)
    for glyph in glyphs:
        columns = _centres(glyph.left, glyph.right, cells.shape[1])
        rows = _centres(glyph.top, glyph.bottom, cells.shape[0])
        cells[rows, columns] = glyph.kind
    tall, wide = height // TOKEN, width // TOKEN
    blocks = cells.reshape(tall, 2, 2, wide, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(tall * wide * 4, 4)


def _centres(low: float, high: float, count: int) -> slice:
    """Cells whose centre lies between two coordinates."""
    half = PROBE / 2
    first = max(0, math.ceil((low - half) / PROBE))
    return slice(first, max(first, min(count - 1, math.floor((high - half) / PROBE)) + 1))


def gram_places(
    glyphs: Sequence[Glyph], width: int, height: int, vocabulary: dict[str, int]
) -> list[tuple[int, int]]:
    """(patch, trigram) of each known trigram whose middle character lies on the crop.

    Patches are numbered in the merger's order: four by four they make a visual token.
    """
    across = width // TOKEN
    places: list[tuple[int, int]] = []
    for glyph in glyphs:
        x, y = (glyph.left + glyph.right) / 2, (glyph.top + glyph.bottom) / 2
        if 0 <= x < width and 0 <= y < height and glyph.gram in vocabulary:
            row, column = int(y) // PATCH, int(x) // PATCH
            token = row // 2 * across + column // 2
            places.append((4 * token + 2 * (row % 2) + column % 2, vocabulary[glyph.gram]))
    return places


def render_page(text: str, font: str, points: float = 11.0, dpi: int = 103) -> Image.Image:
    """A half letter page (5.5 x 8.5 inches) with ``text`` at its top, as a picture.

    103 dpi is the scale at which a whole letter page fills 1280 visual tokens.
    """
    scale = dpi / 72
    page = Image.new("RGB", (int(396 * scale), int(612 * scale)), "white")
    drawn = ImageDraw.Draw(page)
    face = _font(font, round(points * scale))
    margin, line, y = 36 * scale, "", 36 * scale
    for word in [*text.split(), None]:
        longer = line if word is None else f"{line} {word}".strip()
        if word is None or face.getlength(longer) > page.width - 2 * margin:
            drawn.text((margin, y), line, font=face, fill="black")
            y += 1.25 * points * scale
            longer = word or ""
        line = longer
    return page
