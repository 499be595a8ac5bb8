"""Images of PDF pages and of their parts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pymupdf

from mmrag.reading.files import write
from mmrag.reading.options import Box, ReadOptions

POINTS_PER_INCH = 72


def save_image(page: Any, path: Path, options: ReadOptions, clip: Box | None = None) -> None:
    """Render a page, or a part of it, unless that was done before."""
    scale = scale_of(page, options, clip)
    expected = (pymupdf.Rect(clip or page.rect) * pymupdf.Matrix(scale, scale)).irect
    size = _png_size(path)
    # Images are used again after a run that was cut short, but not with another dpi. The engine may
    # round an edge otherwise.
    if size and abs(size[0] - expected.width) <= 1 and abs(size[1] - expected.height) <= 1:
        return
    write(path, rendered(page, scale, clip))


def scale_of(page: Any, options: ReadOptions, clip: Box | None = None) -> float:
    """Pixels per point, within the limits.

    Raises:
        ValueError: For a page of no size.
    """
    area = pymupdf.Rect(clip or page.rect)
    if area.width < 1 or area.height < 1:
        raise ValueError(f"it is {area.width:g} x {area.height:g} points large")
    most = (options.max_page_pixels / (area.width * area.height)) ** 0.5
    return float(min(options.dpi / POINTS_PER_INCH, most))


def rendered(page: Any, scale: float, clip: Box | None = None) -> bytes:
    """A page, or a part of it, as PNG. scale: pixels per point."""
    matrix = pymupdf.Matrix(scale, scale)
    png: bytes = page.get_pixmap(matrix=matrix, alpha=False, clip=clip).tobytes("png")
    return png


def is_blank(page: Any) -> bool:
    """Whether nothing is to be seen on a page, at a resolution that shows a line of text."""
    return bool(page.get_pixmap(dpi=36, colorspace=pymupdf.csGRAY, alpha=False).is_unicolor)


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height from the header of a PNG; None where there is no such file."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except FileNotFoundError:
        return None
    if len(head) < 24:
        return None
    width, height = struct.unpack(">II", head[16:24])
    return width, height
