"""The text layer of a PDF page: its words, mended, and whether they can be trusted."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import pymupdf

from mmrag.reading.boxes import area, as_box, clipped, moved
from mmrag.reading.columns import Word
from mmrag.reading.legibility import garbled_lines, has_words, lost_share
from mmrag.reading.rendering import is_blank
from mmrag.reading.symbols import spelt_out, table_of

# Ligatures are kept, for the engine swaps the letters of Arabic ones when it takes them apart.
_TEXT_FLAGS = (
    pymupdf.TEXT_PRESERVE_WHITESPACE | pymupdf.TEXT_PRESERVE_LIGATURES | pymupdf.TEXT_MEDIABOX_CLIP
)
_SCAN_SHARE = 0.6  # of the page that one image covers; figures and photographs are smaller
# Share of the page that its words cover. A stamp, a footer or a title over a scan has under
# 1 %, a page of text has 10 to 30 %.
_SPARSE_SHARE = 0.03
_LOST_SHARE = 0.4  # of a line's characters without meaning; odd bullets and symbols are fewer
_HOLE = re.compile(r"\w\ufffd+\w")  # a letter that the font does not name
_HOLED_SHARE = 0.25  # of a line's words; a lost apostrophe or ligature is in fewer

Doubt: TypeAlias = Literal["none", "empty", "sparse", "illegible"]


@dataclass(frozen=True, slots=True)
class PageText:
    """What the text layer of a page gives.

    words: those that can be trusted, in boxes of the page as shown.
    garbled: those on lines that look garbled; what means nothing at all is in neither.
    n_bad_lines: how many lines are garbled or mean nothing.
    n_holed_lines: how many of the other lines lack letters inside of many words.
    doubt: why the page may hold text that is not among ``words``: there are none (``empty``),
        few of them on a page that is an image (``sparse``), or lines that make no sense
        (``illegible``); ``none`` where the layer can be trusted.
    """

    words: list[Word]
    doubt: Doubt = "none"
    garbled: list[Word] = field(default_factory=list)
    n_bad_lines: int = 0
    n_holed_lines: int = 0

    def as_it_is(self) -> list[Word]:
        """The words where nothing is recognised: garbled lines stay if they are the fewer."""
        mostly_garbled = _n_characters(self.garbled) > _n_characters(self.words)
        return self.words if mostly_garbled else [*self.words, *self.garbled]


def page_text(page: Any) -> PageText:
    """The words of a page's text layer, and whether they are to be doubted."""
    shown = tuple(page.rotation_matrix)
    raw = [Word(w.text, moved(w.box, shown), w.block, w.line) for w in _raw_words(page)]
    layer = _legible(raw)
    words = layer.words
    if layer.n_bad_lines:
        return layer
    if not words:
        return PageText([], "none" if is_blank(page) else "empty")
    bounds = as_box(page.rect)
    covered = sum(area(clipped(word.box, bounds)) for word in words)
    is_text = has_words(" ".join(word.text for word in words))
    sparse = covered < _SPARSE_SHARE * area(bounds) or not is_text
    if sparse:
        images = (clipped(moved(each["bbox"], shown), bounds) for each in page.get_image_info())
        if any(area(box) > _SCAN_SHARE * area(bounds) for box in images):
            return PageText(words if is_text else [], "sparse")
    return layer


def _n_characters(words: Sequence[Word]) -> int:
    return sum(len(word.text) for word in words)


def _legible(words: Sequence[Word]) -> PageText:
    """The words on lines that make sense and those on garbled ones, and how many lines are bad."""
    lines: dict[tuple[int, int], list[Word]] = defaultdict(list)
    for word in words:
        lines[word.block, word.line].append(word)
    texts = [" ".join(word.text for word in line) for line in lines.values()]
    # A line of one lost character is a bullet; more are text that nobody will find.
    lost = {i for i, text in enumerate(texts) if len(text) > 1 and lost_share(text) > _LOST_SHARE}
    odd = garbled_lines(texts) - lost
    legible: list[Word] = []
    garbled: list[Word] = []
    n_holed = 0
    for i, line in enumerate(lines.values()):
        if i not in lost:
            (garbled if i in odd else legible).extend(line)
            n_holed += i not in odd and _has_holes(line)
    n_bad = len(lost) + len(odd)
    return PageText(legible, "illegible" if n_bad else "none", garbled, n_bad, n_holed)


def _has_holes(line: Sequence[Word]) -> bool:
    """Whether letters are missing inside of many words, so that these are not found."""
    holes = sum(_HOLE.search(word.text) is not None for word in line)
    return holes > 1 and holes >= _HOLED_SHARE * len(line)


def _raw_words(page: Any) -> list[Word]:
    """The words as the engine gives them, with symbols and Arabic ligatures mended."""
    layer = page.get_textpage(flags=_TEXT_FLAGS)
    words = [
        Word(text, (x0, y0, x1, y1), block, line)
        for x0, y0, x1, y1, text, block, line, _ in page.get_text("words", textpage=layer)
        if not text.isspace()
    ]
    tables = _symbol_fonts(page)
    if tables or any(_has_alef_before_lam(word.text) for word in words):
        return _mended(words, list(_characters(layer, tables)))
    return words


def _symbol_fonts(page: Any) -> dict[str, dict[int, str]]:
    """The codes of the page's symbol fonts, by name, of those that do not say what they mean."""
    # The engine gives their codes as they are, or from U+F000 on.
    found: dict[str, dict[int, str]] = {}
    for xref, _, _, name, *_ in page.get_fonts():
        table = table_of(name)
        if table is None:
            continue
        keys = {key: page.parent.xref_get_key(xref, key)[0] for key in ("ToUnicode", "Encoding")}
        if keys["ToUnicode"] == "null" and keys["Encoding"] in ("null", "name"):
            found[name.rpartition("+")[2]] = table
    return found


def _characters(layer: Any, tables: dict[str, dict[int, str]]) -> Iterator[tuple[str, str]]:
    """Each character of a layer as it is, and as it should be; white space is left out."""
    held: tuple[str, str] | None = None
    for block in layer.extractRAWDICT()["blocks"]:
        for line in block.get("lines", ()):
            for span in line["spans"]:
                table = tables.get(span["font"].rpartition("+")[2])
                for char in span["chars"]:
                    raw, box = char["c"], char["bbox"]
                    if raw.isspace():
                        continue
                    if held is not None:
                        # Of a ligature's two letters the second has no width and comes first.
                        first, second = (raw, held[1]) if raw == "\u0644" else (held[1], raw)
                        yield held[0], first
                        yield raw, second
                        held = None
                    elif raw in _ALEFS and box[2] - box[0] < 0.01:
                        held = raw, raw
                    else:
                        yield raw, spelt_out(raw, table) if table else raw
    if held is not None:
        yield held


_ALEFS = "\u0627\u0622\u0623\u0625"


def _has_alef_before_lam(text: str) -> bool:
    return not text.isascii() and any(f"{alef}\u0644" in text for alef in _ALEFS)


def _mended(words: Sequence[Word], characters: Sequence[tuple[str, str]]) -> list[Word]:
    """The words with their characters replaced; as they are if the two do not run in step."""
    out: list[Word] = []
    at = 0
    for word in words:
        raw = [char for char in word.text if not char.isspace()]
        pairs = characters[at : at + len(raw)]
        if [before for before, _ in pairs] != raw:
            # Half mended would be worse than as the engine gave them.
            return list(words)
        out.append(replace(word, text="".join(after for _, after in pairs)))
        at += len(raw)
    return out
