"""Geometry of boxes on a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmrag.reading.options import Box


def as_box(rect: Any) -> Box:
    """The box of four numbers, also of those that are given from right to left."""
    x0, y0, x1, y1 = (float(value) for value in rect)
    return (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def union(boxes: Iterable[Box]) -> Box:
    """The smallest box around all boxes; there must be one at least."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (min(x0), min(y0), max(x1), max(y1))


def moved(corners: Sequence[float], matrix: Sequence[float]) -> Box:
    """The box around two corners after a matrix (a, b, c, d, e, f) as PDF has them."""
    a, b, c, d, e, f = matrix
    x0, y0, x1, y1 = corners
    # Sorted, since a turn of 90 or 180 degrees swaps the corners.
    left, right = sorted((a * x0 + c * y0 + e, a * x1 + c * y1 + e))
    top, bottom = sorted((b * x0 + d * y0 + f, b * x1 + d * y1 + f))
    return (left, top, right, bottom)


def clipped(box: Box, bounds: Box) -> Box:
    """The part of a box that lies in the bounds; of no size where none does."""
    x0, y0 = max(box[0], bounds[0]), max(box[1], bounds[1])
    return (x0, y0, max(x0, min(box[2], bounds[2])), max(y0, min(box[3], bounds[3])))


def holds(box: Box, other: Box) -> bool:
    """Whether the middle of ``other`` lies in ``box``."""
    x, y = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def sides(box: Box) -> tuple[float, float]:
    """Width and height."""
    return (box[2] - box[0], box[3] - box[1])


def area(box: Box) -> float:
    """Width times height."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def distance(one: Box, other: Box) -> float:
    """The larger of the horizontal and the vertical distance; 0 where they overlap."""
    return max(one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3], 0.0)
