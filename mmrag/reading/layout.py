"""From words with boxes to text in reading order."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

from mmrag.reading import bidi
from mmrag.reading.boxes import holds, sides, union
from mmrag.reading.characters import clean, is_right_to_left, is_unspaced
from mmrag.reading.columns import Line, Word, regions
from mmrag.reading.options import Box

Turn: TypeAlias = Literal["none", "down", "up", "back", "mirrored"]
"""Where most of a page's text runs. mirrored: from right to left, as Hebrew and Arabic."""

_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u2026][\"'\u2019\u201d)\]]*$")
_HYPHENS = "-\u2010\u00ad"

# Lengths are in points, or in heights of a line where they are said to be.
_SAME_ROW = 0.4  # of the height that the middles of two lines on one row may differ by
_PARAGRAPH_SPACE = 0.6  # line heights between lines of different paragraphs
_WRAP_SPACE = 0.25  # line heights of the space before the word that did not fit any more
_NO_SPACE = 0.5  # heights of a character: less is no space between ideographs
_VERTICAL = 1.5  # times its width that the one word of a vertical line is high
_SAME_COLUMN = 0.25  # widths that the middles of two characters of a column may differ by
_STEP = (0.5, 1.6)  # heights of a character from one to the next in a vertical column


@dataclass(frozen=True, slots=True)
class Token:
    """A word in reading order. gap: what stands before it: nothing, a space, or line ends."""

    text: str
    box: Box
    gap: str = " "


def text_of(tokens: Sequence[Token]) -> str:
    """The tokens as one string."""
    return "".join(token.gap + token.text for token in tokens).strip()


def in_reading_order(words: Sequence[Word], apart: Sequence[Box] = ()) -> list[Token]:
    """Tokens of a page: columns one after the other, lines joined to paragraphs, words mended.

    apart: boxes, as of figures, whose words are read by themselves, after the others.
    """
    parts: list[list[Word]] = [[] for _ in range(len(apart) + 1)]
    for word in words:
        if text := clean(word.text).strip():
            inside = (i for i, box in enumerate(apart, 1) if holds(box, word.box))
            parts[next(inside, 0)].append(Word(text, word.box, word.block, word.line))
    return [token for part in parts for token in _ordered(part)]


def _ordered(words: Sequence[Word]) -> list[Token]:
    words = _join_vertical(words)
    turn = _direction(words)
    if turn != "none":
        words = [replace(word, box=_turned(word.box, turn)) for word in words]
    lines = _lines(words)
    tokens: list[Token] = []
    for region in regions(lines):
        tokens += _region_tokens(region, mirrored=turn == "mirrored")
    return [Token(t.text, _turned(t.box, _BACK[turn]), t.gap) for t in _mended(tokens)]


def _join_vertical(words: Sequence[Word]) -> list[Word]:
    """Each column of characters one below the other as one word."""
    # The engine gives each character of vertical Chinese and Japanese as a line of its own.
    steps = [_stands_below(above, below) for above, below in pairwise(words)]
    n_single = sum(len(word.text) == 1 and is_unspaced(word.text) for word in words)
    if sum(steps) * 2 <= max(n_single, len(words) - n_single):
        return list(words)
    columns: list[list[Word]] = [[word] for word in words[:1]]
    for word, continues in zip(words[1:], steps, strict=True):
        if continues:
            columns[-1].append(word)
        else:
            columns.append([word])
    return [
        replace(column[0], text="".join(w.text for w in column), box=union(w.box for w in column))
        for column in columns
    ]


def _stands_below(above: Word, below: Word) -> bool:
    """Whether two short words are neighbours in a vertical column; two digits may share a cell."""
    if max(len(above.text), len(below.text)) > 2:
        return False
    (x0, y0, x1, y1), (u0, v0, u1, _) = above.box, below.box
    width, height = max(x1 - x0, u1 - u0), y1 - y0
    same_column = abs((x0 + x1) - (u0 + u1)) / 2 < _SAME_COLUMN * width
    return same_column and _STEP[0] * height < v0 - y0 < _STEP[1] * height


_BACK: dict[Turn, Turn] = {
    "none": "none", "down": "up", "up": "down", "back": "back", "mirrored": "mirrored",
}  # fmt: skip


def _turned(box: Box, turn: Turn) -> Box:
    """Turn a box so that text which runs ``turn`` runs to the right."""
    x0, y0, x1, y1 = box
    match turn:
        case "none":
            return box
        case "down":
            return (y0, -x1, y1, -x0)
        case "up":
            return (-y1, x0, -y0, x1)
        case "back":
            return (-x1, -y1, -x0, -y0)
        case "mirrored":
            return (-x1, y0, -x0, y1)


def _direction(words: Sequence[Word]) -> Turn:
    """Where most of the text runs, by the first and last words of its lines."""
    votes: dict[Turn, int] = dict.fromkeys(_BACK, 0)
    for line in _lines(words):
        first, last = line.words[0].box, line.words[-1].box
        across = abs(last[0] - first[0]) + abs(last[2] - first[2])
        along = (last[1] - first[1]) + (last[3] - first[3])
        width, height = sides(line.box)
        n_mirrored = sum(is_right_to_left(word.text) for word in line.words)
        if abs(along) > across:
            votes["down" if along > 0 else "up"] += len(line.words)
        elif n_mirrored * 2 >= len(line.words):
            votes["mirrored"] += len(line.words)
        elif len(line.words) > 1:
            back = last[2] < first[0] and not n_mirrored
            votes["back" if back else "none"] += len(line.words)
        elif is_unspaced(line.words[0].text):  # a line without spaces is one word
            votes["down" if height > _VERTICAL * width else "none"] += len(line.words[0].text)
    return max(votes, key=lambda turn: votes[turn])


def _lines(words: Sequence[Word]) -> list[Line]:
    grouped: dict[tuple[int, int], list[Word]] = defaultdict(list)
    for word in words:
        grouped[word.block, word.line].append(word)
    return [Line(tuple(group), union(w.box for w in group)) for group in grouped.values()]


def _region_tokens(lines: Sequence[Line], mirrored: bool) -> list[Token]:
    edges: dict[int, float] = defaultdict(lambda: float("-inf"))
    for line in lines:
        block = line.words[0].block
        edges[block] = max(edges[block], line.box[2])
    tokens: list[Token] = []
    above: list[Line] = []
    for row in _rows(lines):
        gap = _gap_between(above, row, edges) if above else "\n\n"
        before: Word | None = None
        for word in _row_words(row, mirrored):
            if before is not None:
                gap = _gap_within(before, word)
            tokens.append(Token(word.text, word.box, gap))
            before = word
        above = row
    return tokens


def _row_words(row: Sequence[Line], mirrored: bool) -> list[Word]:
    """The words of a row in the order they are read in."""
    words = [word for line in row for word in line.words]
    if not any(is_right_to_left(word.text) for word in words):
        # The row may be of a left-to-right language on a page that is mirrored.
        lines = reversed(row) if mirrored else row
        return [word for line in lines for word in line.words]
    words.sort(key=lambda word: word.box[0], reverse=mirrored)
    return bidi.in_reading_order(words, lambda word: word.text)


def _gap_within(before: Word, word: Word) -> str:
    """What stands between two words of a row: a space, but not inside of unspaced text."""
    apart = max(word.box[0] - before.box[2], before.box[0] - word.box[2])
    near = apart < _NO_SPACE * (word.box[3] - word.box[1])
    return "" if near and _is_one_run(before.text, word.text) else " "


def _is_one_run(last: str, first: str) -> bool:
    return is_unspaced(last[-1]) and is_unspaced(first[0])


def _rows(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines grouped by height, each row from left to right."""
    rows: list[list[Line]] = []
    middle, height = 0.0, 0.0
    for line in sorted(lines, key=lambda line: line.box[1] + line.box[3]):
        centre = (line.box[1] + line.box[3]) / 2
        tall = line.box[3] - line.box[1]
        if rows and abs(centre - middle) < _SAME_ROW * min(height, tall):
            rows[-1].append(line)
        else:
            rows.append([line])
            middle, height = centre, tall
    return [sorted(row, key=lambda line: line.box[0]) for row in rows]


def _gap_between(above: list[Line], row: list[Line], edges: dict[int, float]) -> str:
    """A space where the line above was wrapped, else the end of a line or of a paragraph."""
    last, first = above[-1], row[0]
    height = min(last.box[3] - last.box[1], first.box[3] - first.box[1])
    apart = first.box[1] - last.box[3]
    if len(above) == len(row) == 1 and apart < height:
        word = first.words[0].box
        edge = max(edges[last.words[0].block], edges[first.words[0].block])
        if _is_broken(last.words[-1].text, first.words[0].text):
            return " "
        # A line was wrapped if the next line's first word would not have fitted on it. Text
        # without spaces breaks anywhere: its first character counts.
        width = word[2] - word[0]
        if is_unspaced(first.words[0].text):
            width /= len(first.words[0].text)
        if last.box[2] + width + _WRAP_SPACE * height > edge:
            same = last.words[0].block == first.words[0].block
            if same or _runs_on(last.words[-1].text, first.words[0].text):
                return "" if _is_one_run(last.words[-1].text, first.words[0].text) else " "
    return "\n" if apart < _PARAGRAPH_SPACE * height else "\n\n"


def _runs_on(last: str, first: str) -> bool:
    """Whether a sentence goes on from one block to the next."""
    return not _SENTENCE_END.search(last) and first[:1].islower()


def _is_broken(text: str, after: str) -> bool:
    """Whether a word was hyphenated: a letter and a hyphen, then a small letter."""
    return text[-1:] in _HYPHENS and text[-2:-1].isalpha() and after[:1].islower()


def _mended(tokens: Sequence[Token]) -> list[Token]:
    """Join words that were hyphenated at the end of a line; other soft hyphens go."""
    out: list[Token] = []
    for i, token in enumerate(tokens):
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        text = token.text
        broken = (
            after is not None
            and after.gap == " "
            and after.box[1] > token.box[1] + 0.5 * (token.box[3] - token.box[1])
            and _is_broken(text, after.text)
        )
        glued = bool(out) and out[-1].text.endswith("\0")
        if glued:
            out[-1] = replace(out[-1], text=out[-1].text[:-1])
        text = text[:-1] + "\0" if broken else text
        text = text.replace("\u00ad", "")
        if text:
            out.append(Token(text, token.box, "" if glued else token.gap))
    return out
