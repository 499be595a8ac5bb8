"""Images to fit the vision side on, and to measure it: rendered pages, and drawings with titles."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmrag.content import load_image
from mmrag.errors import ConfigError, ContentError

_LARGEST = 224  # pixels: longer side of a drawing
_PER_TITLE = 3  # drawings of one title that are used


def find_fonts(folder: Path, faces: Sequence[str] = ("",)) -> list[str]:
    """Font files below ``folder`` whose names begin like one of ``faces``.

    Raises:
        ConfigError: If there is none.
    """
    files = sorted(str(p) for p in folder.rglob("*.[to]tf") if p.name.startswith(tuple(faces)))
    if not files:
        raise ConfigError(f"{folder}: no TrueType or OpenType fonts named {', '.join(faces)}.")
    return files


def render_page(text: str, font: str, points: float = 11.0, dpi: int = 103) -> Image.Image:
    """A half letter page (5.5 x 8.5 inches) with ``text`` at its top.

    103 dpi is the scale at which a whole letter page fills 1280 visual tokens.
    """
    scale = dpi / 72
    page = Image.new("RGB", (int(396 * scale), int(612 * scale)), "white")
    drawn = ImageDraw.Draw(page)
    # The basic layout needs no extra library and is the same everywhere.
    face = ImageFont.truetype(font, round(points * scale), layout_engine=ImageFont.Layout.BASIC)
    margin, line, y = 36 * scale, "", 36 * scale
    for word in [*text.split(), None]:
        longer = line if word is None else f"{line} {word}".strip()
        if word is None or face.getlength(longer) > page.width - 2 * margin:
            drawn.text((margin, y), line, font=face, fill="black")
            y += 1.25 * points * scale
            longer = word or ""
        line = longer
    return page


def random_page(text: str, fonts: Sequence[str], rng: random.Random) -> Image.Image:
    """A page in random type, cut off at a random height below its text."""
    page = render_page(text, rng.choice(fonts), points=rng.uniform(10, 12))
    ink = page.convert("L").point(lambda value: 255 if value < 200 else 0).getbbox()
    # White space below the text would be most of the visual tokens of a short one.
    bottom = (ink[3] if ink else 0) + rng.randint(4, 60)
    return page.crop((0, 0, page.width, min(page.height, bottom)))


@dataclass(frozen=True)
class Titled:
    """A drawing of at most 224 pixels a side, its title, and the names of its folders."""

    title: str
    topic: str
    image: Image.Image


def is_held_out(title: str) -> bool:
    """Whether drawings of this title are for measuring, as one title in eight is."""
    # By title, so that another drawing of the same thing is not trained on either.
    return zlib.crc32(title.encode()) % 8 == 0


def read_titled(folder: Path, held_out: bool) -> list[Titled]:
    """Drawings below ``folder``, at most three of a title, which are the words of the file name.

    Files that cannot be read as images are left out, and counted on the console.
    """
    found: dict[str, list[Titled]] = {}
    left_out = 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".jpg"}):
        title = _words(path.stem)
        same = found.setdefault(title, [])
        if not title or is_held_out(title) != held_out or len(same) == _PER_TITLE:
            continue
        try:
            image = load_image(path)
        except ContentError:
            left_out += 1
            continue
        image.thumbnail((_LARGEST, _LARGEST))
        topic = " ".join(_words(part) for part in path.relative_to(folder).parts[:-1])
        same.append(Titled(title, topic, image))
    if left_out:
        print(f"{left_out} drawings could not be read and were left out")
    return [one for same in found.values() for one in same]


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z]{3,}", name.lower()))
