"""Quotes on the pages of an original PDF; runs in a worker process.

For pages whose words indexing has not kept: see ``pagewords``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmrag.reading import figures, layout, marking
from mmrag.reading.files import write
from mmrag.reading.options import Box, ReadOptions, Refused
from mmrag.reading.pdf import comment_tokens, joined, open_pdf, recognised_words
from mmrag.reading.rendering import rendered, scale_of
from mmrag.reading.textlayer import page_text


def count_pages(path: Path) -> Iterator[int]:
    """How many pages a PDF has."""
    with contextlib.closing(open_pdf(path)) as document:
        yield document.page_count


def locate(path: Path, page: int, quote: str, recognise: bool) -> Iterator[list[Box]]:
    """The boxes of a quote on a page; where the text layer is doubted, by OCR if told so."""
    with contextlib.closing(open_pdf(path)) as document:
        shown = _page(document, page)
        layer = page_text(shown)
        words = layer.as_it_is()
        # In the order that indexing used, or a quote from a column beside a figure would not be
        # found.
        apart = [figure.box for figure in figures.find_figures(shown, words)]
        if layer.doubt != "none" and recognise:
            words = joined(layer.words, recognised_words(shown, ReadOptions()))
        tokens = [*layout.in_reading_order(words, apart), *comment_tokens(shown)]
    yield marking.find_quote(tokens, quote)


def mark(path: Path, page: int, boxes: Sequence[Box], out: Path) -> Iterator[Path]:
    """Write a PNG of the page with boxes marked."""
    with contextlib.closing(open_pdf(path)) as document:
        shown = _page(document, page)
        scale = scale_of(shown, ReadOptions())
        write(out, marking.mark_boxes(rendered(shown, scale), boxes, scale))
    yield out


def _page(document: Any, page: int) -> Any:
    if not 1 <= page <= document.page_count:
        raise Refused(f"there is no page {page}; the file has {document.page_count}")
    return document[page - 1]
