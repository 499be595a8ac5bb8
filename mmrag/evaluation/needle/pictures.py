"""Pictures to hide: a few shapes in a colour, and bar charts whose words are pixels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (205, 38, 38),
    "green": (34, 139, 60),
    "blue": (35, 75, 190),
    "yellow": (240, 205, 40),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
    "orange": (240, 130, 30),
    "purple": (125, 50, 150),
}
_CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "circle": 60}
SHAPES = (*_CORNERS, "star", "cross")
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
_PLACES = {
    1: ((0.5, 0.5),),
    2: ((0.28, 0.5), (0.72, 0.5)),
    3: ((0.5, 0.28), (0.27, 0.72), (0.73, 0.72)),
    4: ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
}
_RADIUS = {1: 0.34, 2: 0.2, 3: 0.2, 4: 0.19}


@dataclass(frozen=True)
class Shapes:
    """A picture of shapes: how many, of which form and colour, on which ground.

    Examples:
        >>> Shapes(3, "star", "red", "blue").words
        'three red stars on a blue ground'
    """

    count: int
    shape: str
    colour: str
    ground: str

    @property
    def words(self) -> str:
        """The picture in words, which no other one has."""
        if self.count == 1:
            return f"one {self.colour} {self.shape} on {_article(self.ground)} ground"
        plural = f"{self.shape}es" if self.shape.endswith("s") else f"{self.shape}s"
        return f"{_COUNTS[self.count]} {self.colour} {plural} on {_article(self.ground)} ground"


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def all_shapes() -> list[Shapes]:
    """Every picture that can be told from every other one by its words."""
    every = product(_COUNTS, SHAPES, COLOURS, COLOURS)
    return [Shapes(*each) for each in every if each[2] != each[3]]


@lru_cache(maxsize=2048)
def draw_shapes(shapes: Shapes, size: int = 160) -> bytes:
    """The picture as PNG, ``size`` pixels square."""
    image = Image.new("RGB", (size, size), COLOURS[shapes.ground])
    draw = ImageDraw.Draw(image)
    radius = _RADIUS[shapes.count] * size
    for x, y in _PLACES[shapes.count]:
        outline = _outline(shapes.shape, x * size, y * size, radius)
        draw.polygon(outline, fill=COLOURS[shapes.colour])
    return as_png(image)


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "cross":
        arm = radius / 3
        steps = [(-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm)]
        steps += [(arm, arm), (arm, radius), (-arm, radius), (-arm, arm), (-radius, arm)]
        return [(x + dx, y + dy) for dx, dy in [*steps, (-radius, -arm), (-arm, -arm)]]
    corners = 10 if shape == "star" else _CORNERS[shape]
    # A square stands on its side, all others on a corner or point.
    start = -math.pi / 4 if shape == "square" else -math.pi / 2
    points = []
    for corner in range(corners):
        angle = start + 2 * math.pi * corner / corners
        # Every second corner of a star lies inside.
        reach = radius * (0.42 if shape == "star" and corner % 2 else 1)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def draw_bars(title: str, values: Sequence[tuple[str, int]]) -> bytes:
    """A bar chart as PNG: the title above, a label under each bar, its value on top."""
    width, height, base = 900, 520, 450
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, 38), title, "black", ImageFont.load_default(34), anchor="mm")
    font = ImageFont.load_default(26)
    step = (width - 80) / len(values)
    top = max(value for _, value in values)
    for place, (label, value) in enumerate(values):
        x = 40 + step * (place + 0.5)
        y = base - 330 * value / top
        draw.rectangle((x - step * 0.32, y, x + step * 0.32, base), fill=(60, 110, 150))
        draw.text((x, y - 18), str(value), "black", font, anchor="mm")
        draw.text((x, base + 26), label, "black", font, anchor="mm")
    draw.line((40, base, width - 40, base), fill="black", width=3)
    return as_png(image)


def as_png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
