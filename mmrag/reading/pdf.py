"""PDF files through PyMuPDF, page by page; runs in a worker process.

Every box that leaves this package is in points of the page as it is shown: rotated, cut to its
crop box, from its top left corner. Times the scale of the image these are its pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pymupdf

from mmrag.errors import is_environment_error
from mmrag.reading import figures, layout, ocr, overlays
from mmrag.reading.columns import Word
from mmrag.reading.layout import Token
from mmrag.reading.options import (
    Box,
    Figure,
    PageRecord,
    Problem,
    ReadOptions,
    Refused,
    Skipped,
    Step,
)
from mmrag.reading.outline import Outline, printed_label
from mmrag.reading.pagewords import PageWords, save_words
from mmrag.reading.passages import passages_of
from mmrag.reading.rendering import rendered, save_image, scale_of
from mmrag.reading.textlayer import PageText, page_text

# Quiet: what MuPDF complains about is collected and handed on with the page.
pymupdf.TOOLS.mupdf_display_errors(False)
pymupdf.TOOLS.mupdf_display_warnings(False)

_MAX_WARNINGS = 20  # of the engine, a page; damaged files repeat one for every object
_STORE_SHARE_DROPPED = 50  # per cent of the engine's cache after each page

Result = TypeVar("Result")


def read_pages(
    path: Path, folder: Path, options: ReadOptions, first: int, skipped: Skipped
) -> Iterator[PageRecord | Problem | Step]:
    """Read the pages from ``first`` on. skipped: steps that a worker died in before.

    Raises:
        Refused: For a dynamic XFA form, whose pages hold nothing.
    """
    yield Step(None, "open")
    with contextlib.closing(open_pdf(path)) as document:
        if overlays.is_dynamic_form(document):
            raise Refused(
                "the PDF is a dynamic XFA form: its pages say 'Please wait' until Adobe Reader "
                "fills them; open it there and print it to a PDF"
            )
        reader = _Reader(document, folder, options, skipped)
        n_pages, complaint = _page_count(document, options)
        for number in range(first, n_pages + 1):
            yield from reader.read(number)
            # Fonts and images of pages that are done would otherwise pile up.
            pymupdf.TOOLS.store_shrink(_STORE_SHARE_DROPPED)
        if complaint:
            yield Problem(None, complaint)
        if names := overlays.attachments(document):
            yield Problem(None, _attached(names))
        if document.is_repaired:
            yield Problem(
                None,
                f"the file is damaged; {n_pages} pages could be recovered, others may be missing: "
                "compare it with the original",
            )


def _page_count(document: Any, options: ReadOptions) -> tuple[int, str | None]:
    """How many pages are read, and what is to be said about the others."""
    stated = document.page_count
    # Each page is an object of its own: a file that states more pages than it has objects lies.
    possible = min(stated, document.xref_length())
    if possible > options.max_pages:
        return options.max_pages, (
            f"it has {possible:,} pages; the first {options.max_pages:,} are read: split the file, "
            "or raise max_pages"
        )
    if possible < stated:
        return possible, f"it states {stated:,} pages, but has {possible:,} objects at most"
    return stated, None


def open_pdf(path: Path) -> Any:
    """A PyMuPDF document with at least one page.

    Raises:
        Refused: If the document cannot be read: encrypted, empty, or damaged beyond repair.
        OSError: If the file cannot be opened.
    """
    with path.open("rb"):  # a missing file is no damaged one
        pass
    pymupdf.TOOLS.reset_mupdf_warnings()
    try:
        document = pymupdf.open(path, filetype="pdf")
        locked, pages = document.needs_pass, 0 if document.needs_pass else document.page_count
    except Exception as error:  # the engine raises many types for broken files
        raise Refused("not a readable PDF; it is damaged or cut off: get it again") from error
    if locked:
        raise Refused("the PDF is encrypted and needs a password; save a copy without one")
    if not document.is_pdf:
        raise Refused("the content is not a PDF; give the file its right suffix")
    if pages == 0:
        raise Refused("the PDF has no pages; it is empty or damaged: get it again")
    return document


@dataclass
class _Reader:
    """Reads the pages of one document. problems: of the page that is being read."""

    document: Any
    folder: Path
    options: ReadOptions
    skipped: Skipped
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.outline = Outline.of(self.document)
        except Exception:  # noqa: BLE001 - a broken outline costs the headings, not the file
            self.outline = Outline()

    def read(self, number: int) -> Iterator[PageRecord | Problem | Step]:
        """Read one page; what cannot be read of it is left out and said."""
        self.problems = []
        try:
            yield from self._read(number)
        except Exception as error:
            if isinstance(error, OSError) and is_environment_error(error):
                raise  # a full disk is full for the next page as well
            message = f"the page cannot be read ({_short(error)}); it is left out"
            yield Problem(number, message, _is_memory(error))
        yield from self.problems

    def _read(self, number: int) -> Iterator[PageRecord | Step]:
        pymupdf.TOOLS.reset_mupdf_warnings()
        yield Step(number, "text")
        page = self.document[number - 1]
        layer = page_text(page)
        words = self._try(
            number,
            "its form fields cannot be read",
            lambda: overlays.with_fields(page, layer.words),
            layer.words,
        )
        layer = replace(layer, words=words)
        names: list[str] = self._try(
            number,
            "files that are attached to it cannot be named",
            lambda: overlays.attached_here(page),
            [],
        )
        if names:
            self.problems.append(Problem(number, _attached(names)))
        found: list[figures.Found] = []
        if self.options.figures and (number, "figures") not in self.skipped:
            yield Step(number, "figures")
            found = self._try(
                number,
                "the page is kept without its figures, which cannot be looked for",
                lambda: figures.find_figures(page, words),
                [],
            )
        image: Path | None = None
        if (number, "image") not in self.skipped:
            yield Step(number, "image")
            image = self._try(
                number,
                "the page has no image, for it cannot be rendered",
                lambda: self._image(page, number),
                None,
            )
        recognised: list[Word] | None = None
        doubted = layer.doubt != "none" and self.options.ocr == "auto"
        wanted = doubted or self.options.ocr == "force"
        if wanted and (number, "recognition") not in self.skipped:
            yield Step(number, "recognition")
            recognised = self._try(
                number,
                "its text cannot be recognised",
                lambda: recognised_words(page, self.options),
                None,
            )
        yield self._record(page, image, layer, found, recognised)

    def _record(
        self,
        page: Any,
        image: Path | None,
        layer: PageText,
        found: Sequence[figures.Found],
        recognised: Sequence[Word] | None,
    ) -> PageRecord:
        """Put together what the steps gave. recognised: None if recognition was not tried."""
        number = page.number + 1
        if not recognised:
            words = layer.as_it_is()
        elif self.options.ocr == "force":
            words = list(recognised)
        else:
            words = joined(layer.words, recognised)
        tokens = layout.in_reading_order(words, [figure.box for figure in found])
        tokens += self._try(number, "its comments cannot be read", lambda: comment_tokens(page), [])
        drawn: list[Figure] = []
        if image is not None:
            drawn = self._try(
                number,
                "the page is kept without its figures, which cannot be rendered",
                lambda: [self._figure(page, image, figure) for figure in found],
                [],
            )
            # Beside the image: a page without one cannot be marked either.
            save_words(image, PageWords(tokens, scale_of(page, self.options)))
        needs_ocr = recognised is None and layer.doubt != "none"
        if recognised is None:
            self.problems += [Problem(number, message) for message in _doubts(layer)]
        passages = passages_of(
            tokens,
            self.options.passage_words,
            self.options.passage_overlap,
            lambda box: self.outline.at(number, box[1] + 1),
        )
        return PageRecord(
            page=number,
            image=image.as_posix() if image else None,
            text=layout.text_of(tokens),
            text_layer="ocr" if recognised else "pdf" if words else "none",
            label=printed_label(page.get_label()) or str(number),
            section=self.outline.of_page(number),
            passages=tuple(passages),
            figures=tuple(drawn),
            needs_ocr=needs_ocr,
            warnings=_warnings(),
        )

    def _try(
        self, number: int, message: str, step: Callable[[], Result], otherwise: Result
    ) -> Result:
        """The result of a step that the page can do without; if it fails, say so."""
        try:
            return step()
        except Exception as error:
            if isinstance(error, OSError) and is_environment_error(error):
                raise
            self.problems.append(Problem(number, f"{message} ({_short(error)})", _is_memory(error)))
            return otherwise

    def _image(self, page: Any, number: int) -> Path:
        image = self.folder / f"p{number:04d}.png"
        save_image(page, image, self.options)
        return image

    def _figure(self, page: Any, image: Path, found: figures.Found) -> Figure:
        """A figure with its image, which is named by its box and kept beside the page's."""
        name = "-".join(f"{value:.0f}" for value in found.box)
        crop = image.with_name(f"{image.stem}-{name}.png")
        save_image(page, crop, self.options, found.box)
        section = self.outline.at(page.number + 1, found.box[1] + 1)
        return Figure(found.box, found.caption, crop.as_posix(), found.mark, section)


def recognised_words(page: Any, options: ReadOptions) -> list[Word]:
    """The words on a page's image, by OCR."""
    scale = scale_of(page, options)
    return ocr.recognise(rendered(page, scale), scale)


def joined(words: Sequence[Word], recognised: Sequence[Word]) -> list[Word]:
    """The words of a text layer, and those recognised where it has none."""
    first = max((word.block for word in words), default=-1) + 1
    return [*words] + [
        Word(word.text, word.box, first, word.line)
        for word in recognised
        if not any(_overlap(word.box, own.box) for own in words)
    ]


def _overlap(one: Box, other: Box) -> bool:
    """Whether two words stand at one place, give or take the edges of their boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    least = 0.3 * min(one[3] - one[1], other[3] - other[1])
    return width > least and height > least


def comment_tokens(page: Any) -> list[Token]:
    """What was noted on a page, as paragraphs behind its text."""
    return [
        Token(text, comment.box, " " if i else "\n\n")
        for comment in overlays.comments(page)
        for i, text in enumerate(comment.text.split())
    ]


def _attached(names: Sequence[str]) -> str:
    return (
        f"files are attached to it that are not read: {', '.join(names)}; save them beside it and "
        "index them"
    )


def _warnings() -> tuple[str, ...]:
    text = pymupdf.TOOLS.mupdf_warnings()
    return tuple(dict.fromkeys(line for line in text.splitlines() if line))[:_MAX_WARNINGS]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


def _is_memory(error: Exception) -> bool:
    """Whether the limit on memory was hit, in Python or in the engine."""
    return isinstance(error, MemoryError) or "alloc" in str(error)


def _doubts(layer: PageText) -> Iterator[str]:
    """What is wrong with a text layer in whose place nothing was recognised."""
    if layer.doubt == "illegible":
        yield (
            f"{layer.n_bad_lines} of its lines look garbled, as if a font did not say what its "
            f"characters mean; to recognise them, index with --ocr auto ({ocr.INSTALL})"
        )
    if layer.n_holed_lines:
        yield (
            f"letters are missing inside of words on {layer.n_holed_lines} of its lines, as a "
            "font does not say what they are: these words are not found"
        )
