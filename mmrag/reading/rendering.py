"""Images of PDF pages and of their parts."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pymupdf

from mmrag.reading.files import write
from mmrag.reading.options import Box, ReadOptions

POINTS_PER_INCH = 72
_ZLIB_LEVEL = 3
_RGB = 2  # a PNG's colour type


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
    return _png(page.get_pixmap(matrix=matrix, alpha=False, clip=clip))


def _png(pixmap: Any) -> bytes:
    """An RGB pixmap as PNG, its rows unfiltered (PNG specification, section 9).

    MuPDF and Pillow try filters for each row, which takes longer than all else that is done to a
    page, and saves little on drawn text.
    """
    rows = np.zeros((pixmap.height, 1 + 3 * pixmap.width), np.uint8)  # first byte: no filter
    rows[:, 1:] = np.frombuffer(pixmap.samples_mv, np.uint8).reshape(pixmap.height, -1)
    header = struct.pack(">IIBBBBB", pixmap.width, pixmap.height, 8, _RGB, 0, 0, 0)
    data = zlib.compress(rows.data, _ZLIB_LEVEL)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


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
