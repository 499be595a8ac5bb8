"""What of a page can be quoted on its own: sentences, list items and rows of tables.

A page's text layer also holds headings, running heads, page numbers and the ticks of axes. They
have the words of many questions, and answer none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmrag.lexical import sentences, terms

_SENTENCE_END = re.compile(r"[.!:;。！।॥۔…][\"'\u201d\u2019)\]\u300d\u300f]*$")
# A question on a page (a FAQ, a form) has the words of the user's question, and answers nothing.
_QUESTION_END = re.compile(r"[?？؟][\"'\u201d\u2019)\]]*$")
_LIST_ITEM = re.compile(
    r"\s*(?:[\u2022\u25cf\u25e6\u2023\u2043\u00b7\uf0b7*\u2013-]\s|\(?\d{1,2}[.)]\s)"
)
_BULLET = re.compile(r"^\s*(?:[-*\u2022\u25cf\u25e6\u2023\u2043\u00b7\uf0b7#]+\s+|\d{1,2}[.)]\s+)")
_CAPTION = re.compile(
    r"(?:figure|fig|table|chart|abbildung|abb|tabelle|tableau|图|表|図)\b\.?\s*\d", re.I
)
_STARTS_TEXT = (_LIST_ITEM.match, _CAPTION.match)
_CELL_START = re.compile(r"[-+(]?[€$£¥]?\d")
_FIELD = re.compile(r":\s+[^\W\d]")  # of a form: a name with a colon, and what was filled in
_FIELDS = re.compile(r"\S:\s+\S.*?\S:(?:\s|$)")  # two of them on a line
_NO_ROW = (_SENTENCE_END.search, _LIST_ITEM.match, _FIELD.search)
_RULE = re.compile(r"[\s|:-]+")  # below the head of a Markdown table
_HEADING_WORDS = 10
_HEADING_LENGTH = 60  # characters; a longer line without an end mark is a wrapped sentence
_ROW_WORDS = 25
_WITH_LIST = 320  # characters of a sentence with the list that it announces


@dataclass(frozen=True)
class Passage:
    """A piece of a page.

    text: as it is shown. quote: its words as they stand on the page.
    words: what it is judged by. heads: of the columns, where it is a row of a table.
    """

    text: str
    quote: str
    words: tuple[str, ...]
    heads: str = ""


def strip_bullet(text: str) -> str:
    """A list item without its bullet or number."""
    return _BULLET.sub("", text)


def running_lines(pages: Sequence[str]) -> frozenset[str]:
    """Lines that stand on two pages or more, page numbers apart: running heads and feet."""
    # A set for each page: a line repeated within one page is a table's, not a running head.
    seen = Counter(line for page in pages for line in {_bare(line) for line in page.splitlines()})
    return frozenset(line for line, times in seen.items() if times > 1 and line)


def passages(text: str, running: frozenset[str] = frozenset()) -> list[Passage]:
    """The sentences and list items of a page, the rows of its tables and the lines of its forms.

    running: lines to leave out; see ``running_lines``. A page that holds nothing but headings
    gives these.
    """
    lines = [line for line in text.splitlines() if _bare(line) not in running]
    rows, rest = _tables(lines)
    forms = {i for i, line in enumerate(rest) if _is_form(line)}
    prose = "\n".join(
        "" if i in forms or _is_heading(rest, i) else line for i, line in enumerate(rest)
    )
    fields = [_passage(" ".join(rest[i].split())) for i in sorted(forms)]
    found = [*_sentences(prose), *rows, *fields]
    return found or [
        _passage(piece) for piece in sentences(text) if not _QUESTION_END.search(piece)
    ]


def table_rows(text: str) -> list[Passage]:
    """The rows of the tables of a page whose columns have heads, in order."""
    return _tables(text.splitlines())[0]


def _bare(line: str) -> str:
    """A line without its numbers: running heads differ in these."""
    return " ".join(re.sub(r"\d+", " ", line).split())


def _passage(piece: str) -> Passage:
    return Passage(piece, piece, tuple(terms(piece)))


def _is_form(line: str) -> bool:
    """Whether a line has several fields of a form, such as ``Make: Vans  Serial number: 80580``."""
    words = line.split()
    return len(words) <= _ROW_WORDS and not _LIST_ITEM.match(line) and bool(_FIELDS.search(line))


def _is_heading(lines: Sequence[str], index: int) -> bool:
    """Whether a line is a heading, a page number or a tick of an axis.

    It has no end mark, is short, and is not the continuation of the line before it.
    """
    line = lines[index].strip()
    if not line or any(mark(line) for mark in (_SENTENCE_END.search, *_STARTS_TEXT)):
        return False
    if not any(char.isalpha() for char in line):
        return True
    before = lines[index - 1].strip() if index else ""
    after = lines[index + 1].strip() if index + 1 < len(lines) else ""
    if len(line) >= _HEADING_LENGTH or len(line.split()) > _HEADING_WORDS:
        return False
    # The last line of a paragraph is short too; the line before it is long and does not end.
    wrapped = len(before) >= _HEADING_LENGTH and not _SENTENCE_END.search(before)
    return not (wrapped or after[:1].islower() or line[:1].islower())


def _sentences(prose: str) -> list[Passage]:
    """Sentences that can stand alone: one that announces a list is followed by the list."""
    pieces = sentences(prose)
    found: list[Passage] = []
    for i, piece in enumerate(pieces):
        whole = strip_bullet(piece)
        if _QUESTION_END.search(whole):
            continue
        if whole.endswith(":"):
            for item in pieces[i + 1 :]:
                if len(whole) + len(item) >= _WITH_LIST:
                    break
                whole += f" {item}"
            if whole.endswith(":"):
                continue
        found.append(_passage(whole))
    return found


def _tables(lines: Sequence[str]) -> tuple[list[Passage], list[str]]:
    """The rows of tables with the heads of their columns, and the lines that are no part of one."""
    rows: list[Passage] = []
    rest = list(lines)
    filled = [i for i, line in enumerate(lines) if line.strip()]
    place = 0
    while place < len(filled):
        run = place
        while run < len(filled) and _cells(lines[filled[run]]):
            run += 1
        # One line with numbers is a sentence or a caption more often than a table.
        if run - place < 2:
            place += 1
            continue
        # The head of a Markdown table has bars, as its rows do.
        above = place if lines[filled[place]].lstrip().startswith("|") else place - 1
        heads = _heads(lines[filled[above]]) if above >= 0 else []
        below = {i: _cells(lines[i]) for i in filled[above + 1 : run]}
        # A row with more cells than heads: the rows' own heads have none, and which cell of a
        # shorter row is blank cannot be told.
        paired = all(len(cells) <= len(heads) for cells in below.values())
        for i, cells in below.items():
            if heads and not _RULE.fullmatch(lines[i]):
                rows.append(_row(heads, lines[i], cells, paired))
            rest[i] = ""
        if heads:
            rest[filled[above]] = ""
        place = run
    return rows, rest


def _heads(line: str) -> list[str]:
    """The heads of columns in the line above a table; empty if it is something else."""
    if line.lstrip().startswith("|"):
        return _cells(line)
    # One word heads no columns, and a sentence above a table only introduces it.
    if not 1 < len(line.split()) <= _ROW_WORDS or _SENTENCE_END.search(line) or _FIELD.search(line):
        return []
    return re.split(r"\s+(?=[A-Z])", line.strip())


def _cells(line: str) -> list[str]:
    """The head of a row and its cells; empty if it is none.

    Cells stand between bars, as in Markdown, or each begins with a number.
    """
    if (barred := line.strip()).startswith("|"):
        return [cell.strip() for cell in barred.strip("|").split("|")]
    words = line.split()
    if not 2 <= len(words) <= _ROW_WORDS or any(mark(line) for mark in _NO_ROW):
        return []
    starts = [i for i, word in enumerate(words) if _CELL_START.match(word)]
    # A row begins with what it is about. Lines that begin with a number are numbered headings and
    # ticks of axes.
    if not starts or starts[0] == 0 or not words[0][0].isalpha():
        return []
    # A cell is a number and a unit or two; longer text behind a number is a sentence.
    ends = [*starts[1:], len(words)]
    if any(end - start > 3 for start, end in zip(starts, ends, strict=True)):
        return []
    bounds = zip([0, *starts], [*starts, len(words)], strict=True)
    return [" ".join(words[start:end]) for start, end in bounds]


def _row(heads: Sequence[str], line: str, cells: Sequence[str], paired: bool) -> Passage:
    """A row with the heads of its columns.

    Where there is a head for each cell, they are put together if ``paired``:
    ``Full plot: Full fee 150 euros, Reduced fee 75 euros``. Otherwise heads and row follow one
    another.
    """
    head, quote = " ".join(" ".join(heads).split()), " ".join(line.split())
    if paired and len(heads) == len(cells):
        named = zip(heads[1:], cells[1:], strict=True)
        pairs = [f"{name} {cell}" for name, cell in named if cell]
        text = f"{cells[0]}: {', '.join(pairs)}"
    else:
        text = f"{head}: {quote}"
    return Passage(text, quote, tuple(terms(f"{head} {line}")), head)
