"""PDF files written: pages drawn from text and pictures, and pages copied from other files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pymupdf

from mmrag.errors import ReadError
from mmrag.reading.files import find_files
from mmrag.reading.options import Box

PAPER = (595.0, 842.0)
"""Width and height of a drawn page, in points: A4."""

_MARGIN = 64.0
_FONT_SIZE = 10.5
_LEADING = 1.42
_SCAN_DPI = 150  # what office scanners are set to
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class DrawnPage:
    """A page to draw. paragraphs: its text, from the top; pictures: images by their boxes.

    top: points from the top edge at which the text begins; pictures stand where their box says.
    """

    paragraphs: tuple[str, ...] = ()
    pictures: tuple[tuple[Box, bytes], ...] = ()
    top: float = _MARGIN


@dataclass(frozen=True)
class CopiedPage:
    """A page of a PDF file, counted from 1."""

    path: Path
    page: int


WrittenPage: TypeAlias = DrawnPage | CopiedPage


def copyable_pages(folder: Path) -> tuple[list[CopiedPage], list[ReadError]]:
    """Every page of the PDFs of a folder (or of one file), in order, and what cannot be read."""
    found = find_files([folder])
    pages: list[CopiedPage] = []
    errors = list(found.errors)
    for path in found.files:
        if path.suffix.lower() != ".pdf":
            continue
        try:
            count = _page_count(path)
        except ReadError as error:
            errors.append(error)
            continue
        pages += [CopiedPage(path, number) for number in range(1, count + 1)]
    return pages, errors


def _page_count(path: Path) -> int:
    try:
        with pymupdf.open(path) as document:
            if document.needs_pass:
                raise ReadError("it needs a password", file=path.as_posix())
            return int(document.page_count)
    except pymupdf.FileDataError as error:
        raise ReadError(f"it is no PDF ({error})", file=path.as_posix()) from error


def write_pdf(
    path: Path,
    pages: Sequence[WrittenPage],
    *,
    scanned: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Write pages as one PDF.

    Args:
        scanned: each page becomes one image of itself, as from a scanner: no text layer.
        done: called with the number of pages written so far.

    Raises:
        ReadError: If a page cannot be copied.
    """
    opened: dict[Path, pymupdf.Document] = {}
    with pymupdf.open() as out:
        for count, page in enumerate(pages):
            done(count)
            if isinstance(page, DrawnPage):
                _draw(out, page)
            else:
                _copy(out, page, opened)
            if scanned:
                _scan(out, count)
        # First under another name: a file that a kill cut short would be taken for whole.
        part = path.with_suffix(".part")
        out.save(part, garbage=1, deflate=True)
    for document in opened.values():
        document.close()
    part.replace(path)


def _draw(out: pymupdf.Document, page: DrawnPage) -> None:
    sheet = out.new_page(width=PAPER[0], height=PAPER[1])
    y = page.top
    for paragraph in page.paragraphs:
        for line in _lines(paragraph, PAPER[0] - 2 * _MARGIN):
            y += _FONT_SIZE * _LEADING
            sheet.insert_text((_MARGIN, y), line, fontsize=_FONT_SIZE, fontname="tiro")
        y += _FONT_SIZE
    for box, image in page.pictures:
        sheet.insert_image(pymupdf.Rect(box), stream=image)


def _lines(paragraph: str, width: float) -> list[str]:
    lines = [""]
    for word in paragraph.split():
        longer = f"{lines[-1]} {word}".strip()
        if pymupdf.get_text_length(longer, "tiro", _FONT_SIZE) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _copy(out: pymupdf.Document, page: CopiedPage, opened: dict[Path, pymupdf.Document]) -> None:
    try:
        if page.path not in opened:
            opened[page.path] = pymupdf.open(page.path)
        # final=False: what the pages of a file share is copied once.
        at = page.page - 1
        out.insert_pdf(opened[page.path], from_page=at, to_page=at, annots=False, final=False)
    except (pymupdf.FileDataError, RuntimeError, ValueError) as error:
        file = page.path.as_posix()
        raise ReadError(f"it cannot be copied ({error})", file=file, page=page.page) from error


def _scan(out: pymupdf.Document, at: int) -> None:
    """Replace a page by its image."""
    page = out[at]
    image = page.get_pixmap(dpi=_SCAN_DPI).tobytes("jpg", jpg_quality=_JPEG_QUALITY)
    width, height = page.rect.width, page.rect.height
    out.delete_page(at)
    out.new_page(at, width=width, height=height).insert_image(
        pymupdf.Rect(0, 0, width, height), stream=image
    )
