"""PDF files through PyMuPDF; this module alone imports it, and runs in the worker process.

Every box that leaves this module is in points of the page as it is shown: rotated, cut to its
crop box, from its top left corner. Times the scale of the image these are its pixels.
"""

from __future__ import annotations

import contextlib
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pymupdf

from mmrag.errors import is_environment_error
from mmrag.reading import figures, layout, marking
from mmrag.reading.files import write
from mmrag.reading.layout import Token, Word
from mmrag.reading.options import (
    Box,
    Figure,
    PageRecord,
    Problem,
    ReadOptions,
    Step,
    TextLayer,
)

# Quiet: what MuPDF complains about is collected and handed on with the page.
pymupdf.TOOLS.mupdf_display_errors(False)
pymupdf.TOOLS.mupdf_display_warnings(False)

_TEXT_FLAGS = pymupdf.TEXT_PRESERVE_WHITESPACE | pymupdf.TEXT_MEDIABOX_CLIP
_SCANNED_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class OpenProblem(Exception):
    """A file that cannot be opened; the message says what to do."""

    message: str


@dataclass(frozen=True, slots=True)
class Outline:
    """The headings of a document's outline, in the order of their places."""

    places: list[tuple[int, float]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)

    def at(self, page: int, y: float) -> str | None:
        """The heading that a place lies under, with those above it: ``Plans > Dental``."""
        index = bisect_right(self.places, (page, y)) - 1
        return self.headings[index] if index >= 0 else None

    def of_page(self, page: int) -> str | None:
        """The first heading that begins on the page, else the one that it lies under."""
        index = bisect_right(self.places, (page, float("-inf")))
        if index < len(self.places) and self.places[index][0] == page:
            return self.headings[index]
        return self.headings[index - 1] if index else None


def read_pages(
    path: Path,
    folder: Path,
    options: ReadOptions,
    first: int = 1,
    plain_pages: frozenset[int] = frozenset(),
) -> Iterator[PageRecord | Problem | Step]:
    """Read the pages from ``first`` on; figures are not looked for on ``plain_pages``."""
    yield Step(None, "open")
    with contextlib.closing(open_pdf(path)) as document:
        outline = _outline(document)
        for page in range(first, document.page_count + 1):
            plain = options.figures and page not in plain_pages
            try:
                yield from _read_page(document, page, folder, options, outline, plain)
            except Exception as error:  # noqa: BLE001 - any engine error costs one page only
                message = f"the page cannot be read ({_told(error)}); it is left out"
                yield Problem(page, message, is_environment_error(error))
            # Fonts and images of pages that are done would otherwise pile up.
            pymupdf.TOOLS.store_shrink(50)
        if document.is_repaired:
            yield Problem(
                None,
                f"the file is damaged; {document.page_count} pages could be recovered, others may "
                "be missing: compare it with the original",
            )


def open_pdf(path: Path) -> Any:
    """A PyMuPDF document with at least one page.

    Raises: OpenProblem.
    """
    pymupdf.TOOLS.reset_mupdf_warnings()
    try:
        document = pymupdf.open(path, filetype="pdf")
        locked, pages = document.needs_pass, 0 if document.needs_pass else document.page_count
    except Exception as error:  # the engine raises many types for broken files
        raise OpenProblem("not a readable PDF; it is damaged or cut off: get it again") from error
    if locked:
        raise OpenProblem("the PDF is encrypted and needs a password; save a copy without one")
    if not document.is_pdf:
        raise OpenProblem("the content is not a PDF; give the file its right suffix")
    if pages == 0:
        raise OpenProblem("the PDF has no pages; it is empty or damaged: get it again")
    return document


def _read_page(
    document: Any, number: int, folder: Path, options: ReadOptions, outline: Outline, find: bool
) -> Iterator[PageRecord | Problem | Step]:
    pymupdf.TOOLS.reset_mupdf_warnings()
    yield Step(number, "text")
    page = document[number - 1]
    words, layer = page_words(page)
    found = []
    if find:
        yield Step(number, "figures")
        found = figures.find_figures(page, words)
    tokens = layout.in_reading_order(words, [f.box for f in found])
    yield Step(number, "picture")
    image = folder / f"p{number:04d}.png"
    _save(page, image, options)
    drawn = [_drawn(page, image, figure, options, outline) for figure in found]
    if layer == "none" and options.ocr:
        yield Step(number, "recognition")
        tokens = _recognised(image.read_bytes(), _scale(page, options))
        layer = "ocr" if tokens else "none"
    passages = layout.passages_of(
        tokens,
        options.passage_words,
        options.passage_overlap,
        lambda box: outline.at(number, box[1] + 1),
    )
    yield PageRecord(
        page=number,
        label=page.get_label() or str(number),
        section=outline.of_page(number),
        image=image.as_posix(),
        text=layout.text_of(tokens),
        text_layer=layer,
        passages=tuple(passages),
        figures=tuple(drawn),
        warnings=_warnings(),
    )


def page_words(page: Any) -> tuple[list[Word], TextLayer]:
    """The words of a page's text layer; none where it has none that can be used."""
    shown = tuple(page.rotation_matrix)
    words = [
        Word(text, layout.moved((x0, y0, x1, y1), shown), block, line)
        for x0, y0, x1, y1, text, block, line, _ in page.get_text("words", flags=_TEXT_FLAGS)
        if not text.isspace()
    ]
    if not words or _is_garbled(words):
        return [], "none"
    if len(words) < 20 and _is_scan(page):
        return [], "none"  # a stamp on a scan
    return words, "pdf"


def _is_garbled(words: Sequence[Word]) -> bool:
    """Whether most characters have no meaning, as with fonts that lost their encoding."""
    text = "".join(word.text for word in words)
    return len(layout.clean(text)) < 0.6 * len(text)


def _is_scan(page: Any) -> bool:
    area = abs(page.rect.width * page.rect.height)
    images = page.get_image_info()
    return any(
        abs((pymupdf.Rect(p["bbox"]) * page.rotation_matrix & page.rect).get_area())
        > _SCANNED_SHARE * area
        for p in images
    )


def _recognised(png: bytes, scale: float) -> list[Token]:
    """The words of a page's image in reading order, by OCR."""
    from mmrag.reading import ocr

    return layout.in_reading_order(ocr.recognise(png, scale))


def _drawn(
    page: Any, image: Path, found: figures.Found, options: ReadOptions, outline: Outline
) -> Figure:
    """A figure with its image, which is named by its box and kept beside the page's."""
    box = found.box
    name = "-".join(f"{value:.0f}" for value in box)
    crop = image.with_name(f"{image.stem}-{name}.png")
    _save(page, crop, options, box)
    section = outline.at(page.number + 1, box[1] + 1)
    return Figure(box, found.caption, crop.as_posix(), found.mark, section)


def _save(page: Any, image: Path, options: ReadOptions, clip: Box | None = None) -> None:
    """Render the page, or a part of it, unless that was done before."""
    scale = _scale(page, options, clip)
    expected = (pymupdf.Rect(clip or page.rect) * pymupdf.Matrix(scale, scale)).irect
    size = _png_size(image)
    if size and abs(size[0] - expected.width) <= 1 and abs(size[1] - expected.height) <= 1:
        return
    write(image, _rendered(page, scale, clip))


def _scale(page: Any, options: ReadOptions, clip: Box | None = None) -> float:
    """Pixels per point, within the limits."""
    area = pymupdf.Rect(clip or page.rect)
    if area.width < 1 or area.height < 1:
        raise ValueError(f"it is {area.width:g} x {area.height:g} points large")
    return float(
        min(options.dpi / 72, (options.max_page_pixels / (area.width * area.height)) ** 0.5)
    )


def _rendered(page: Any, scale: float, clip: Box | None = None) -> bytes:
    matrix = pymupdf.Matrix(scale, scale)
    png: bytes = page.get_pixmap(matrix=matrix, alpha=False, clip=clip).tobytes("png")
    return png


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


def _outline(document: Any) -> Outline:
    try:
        entries = document.get_toc(simple=False)
    except Exception:  # noqa: BLE001 - a broken outline costs the headings, not the file
        return Outline()
    path: list[str] = []
    found: list[tuple[int, float, int, str]] = []
    for order, (level, title, page, target) in enumerate(entries):
        title = " ".join(layout.clean(title).split())
        path = [*path[: level - 1], title]
        if page > 0 and title:
            top = getattr(target.get("to"), "y", 0.0)
            found.append((page, float(top), order, " > ".join(filter(None, path))))
    found.sort()
    return Outline([entry[:2] for entry in found], [entry[3] for entry in found])


def _warnings() -> tuple[str, ...]:
    text = pymupdf.TOOLS.mupdf_warnings()
    return tuple(dict.fromkeys(line for line in text.splitlines() if line))[:20]


def _told(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


def locate(path: Path, page: int, quote: str, ocr: bool) -> Iterator[list[Box]]:
    """The boxes of a quote on a page; where the page has no text layer, by OCR if asked to."""
    with contextlib.closing(open_pdf(path)) as document:
        shown = _page(document, page)
        words, layer = page_words(shown)
        apart = [figure.box for figure in figures.find_figures(shown, words)]
        tokens = layout.in_reading_order(words, apart)
        if layer == "none" and ocr:
            scale = _scale(shown, ReadOptions())
            tokens = _recognised(_rendered(shown, scale), scale)
    yield marking.find_quote(tokens, quote)


def mark(path: Path, page: int, boxes: Sequence[Box], out: Path) -> Iterator[Path]:
    """Write a PNG of the page with boxes marked."""
    with contextlib.closing(open_pdf(path)) as document:
        shown = _page(document, page)
        scale = _scale(shown, ReadOptions())
        write(out, marking.mark_boxes(_rendered(shown, scale), boxes, scale))
    yield out


def count_pages(path: Path) -> Iterator[int]:
    """How many pages a PDF has."""
    with contextlib.closing(open_pdf(path)) as document:
        yield document.page_count


def recognise(image: Path) -> Iterator[str]:
    """The text on an image, by OCR."""
    yield layout.text_of(_recognised(image.read_bytes(), 1.0))


def _page(document: Any, page: int) -> Any:
    if not 1 <= page <= document.page_count:
        raise OpenProblem(f"there is no page {page}; the file has {document.page_count}")
    return document[page - 1]


OPERATIONS: dict[str, Callable[..., Iterator[Any]]] = {
    "read": read_pages,
    "count": count_pages,
    "locate": locate,
    "mark": mark,
    "recognise": recognise,
}
"""What a worker can be asked for."""
