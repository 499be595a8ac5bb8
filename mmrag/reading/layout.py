"""From words with boxes to text in reading order, and from text to passages.

Columns are found by cutting a page at white gaps, as the recursive XY cut of Nagy and Seth
("Hierarchical representation of optically scanned documents", 1984) does, but a gap between
columns counts only where both sides are running text: the cells of a table stay in rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from mmrag.reading.options import Box, Passage

Turn: TypeAlias = Literal["none", "down", "up", "back"]

_LIGATURES = {
    "\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl",
    "\ufb05": "st", "\ufb06": "st",
}  # fmt: skip
_BULLETS = dict.fromkeys("\uf0b7\uf0a7\uf0d8\uf076\uf0fc\uf0a8\uf02d", "\u2022")
_DROPPED = "\u200b\u2060\ufeff\ufffd\ufffe\uffff"
_SPACES = "\u00a0\u2007\u202f\u2028\u2029\u0085\x0b\x0c"
_TABLE = str.maketrans(
    _LIGATURES | _BULLETS | dict.fromkeys(_DROPPED, "") | dict.fromkeys(_SPACES, " ")
)
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u2026][\"'\u2019\u201d)\]]*$")
_HYPHENS = "-\u2010\u00ad"


@dataclass(frozen=True, slots=True)
class Word:
    """One word as the engine gives it; words of a line share ``block`` and ``line``."""

    text: str
    box: Box
    block: int
    line: int


@dataclass(frozen=True, slots=True)
class Token:
    """A word in reading order. gap: what stands before it: nothing, a space, or line ends."""

    text: str
    box: Box
    gap: str = " "


@dataclass(frozen=True, slots=True)
class _Line:
    words: tuple[Word, ...]
    box: Box


def clean(text: str) -> str:
    """Text without ligatures, control characters, lone surrogates and private-use characters."""
    text = text.translate(_TABLE)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _UNWANTED)


_UNWANTED = frozenset({"Cc", "Cs", "Co", "Cn"})


def union(boxes: Iterable[Box]) -> Box:
    """The smallest box around all boxes; there must be one at least."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (min(x0), min(y0), max(x1), max(y1))


def moved(corners: Sequence[float], matrix: Sequence[float]) -> Box:
    """The box around two corners after a matrix (a, b, c, d, e, f) as PDF has them."""
    a, b, c, d, e, f = matrix
    x0, y0, x1, y1 = corners
    left, right = sorted((a * x0 + c * y0 + e, a * x1 + c * y1 + e))
    top, bottom = sorted((b * x0 + d * y0 + f, b * x1 + d * y1 + f))
    return (left, top, right, bottom)


def holds(box: Box, other: Box) -> bool:
    """Whether the middle of ``other`` lies in ``box``."""
    x, y = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


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
    turn = _direction(words)
    lines = _lines([Word(w.text, _turned(w.box, turn), w.block, w.line) for w in words])
    tokens: list[Token] = []
    for region in _regions(lines):
        tokens += _region_tokens(region)
    return [Token(t.text, _turned(t.box, _BACK[turn]), t.gap) for t in _mended(tokens)]


_BACK: dict[Turn, Turn] = {"none": "none", "down": "up", "up": "down", "back": "back"}


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


def _direction(words: Sequence[Word]) -> Turn:
    """Where most of the text runs, by the first and last words of its lines."""
    votes: dict[Turn, int] = {"none": 0, "down": 0, "up": 0, "back": 0}
    for line in _lines(words):
        first, last = line.words[0].box, line.words[-1].box
        across = abs(last[0] - first[0]) + abs(last[2] - first[2])
        along = (last[1] - first[1]) + (last[3] - first[3])
        if abs(along) > across:
            votes["down" if along > 0 else "up"] += len(line.words)
        elif len(line.words) > 1:
            back = last[2] < first[0] and not _is_right_to_left(line.words[0].text)
            votes["back" if back else "none"] += len(line.words)
    return max(votes, key=lambda turn: votes[turn])


def _is_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


def _lines(words: Sequence[Word]) -> list[_Line]:
    grouped: dict[tuple[int, int], list[Word]] = defaultdict(list)
    for word in words:
        grouped[word.block, word.line].append(word)
    return [_Line(tuple(group), union(w.box for w in group)) for group in grouped.values()]


def _regions(lines: list[_Line]) -> list[list[_Line]]:
    """Split lines into regions to be read one after the other, each from top to bottom."""
    regions: list[list[_Line]] = []
    for band in _bands(lines):
        gap = _column_gap(band)
        if gap is None:
            regions.append(band)
        else:
            regions += _regions([line for line in band if line.box[2] <= gap])
            regions += _regions([line for line in band if line.box[2] > gap])
    return regions


def _bands(lines: list[_Line]) -> list[list[_Line]]:
    """Lines cut into full-width bands; neighbours stay together while columns run through both."""
    bands: list[list[_Line]] = []
    bottom = float("-inf")
    for line in sorted(lines, key=lambda line: line.box[1]):
        if line.box[1] >= bottom - 1:
            bands.append([])
        bands[-1].append(line)
        bottom = max(bottom, line.box[3])
    merged: list[list[_Line]] = []
    columns = False
    for band in bands:
        near = bool(merged) and _space_between(merged[-1], band) < 3 * _height(band)
        together = near and _column_gap(merged[-1] + band) is not None
        if merged and (together or (not columns and _column_gap(band) is None)):
            merged[-1] += band
            columns = together
        else:
            merged.append(list(band))
            columns = _column_gap(band) is not None
    return merged


def _space_between(above: Sequence[_Line], below: Sequence[_Line]) -> float:
    return min(line.box[1] for line in below) - max(line.box[3] for line in above)


def _height(lines: Sequence[_Line]) -> float:
    return max(line.box[3] - line.box[1] for line in lines)


def _column_gap(lines: Sequence[_Line], narrowest: float = 8.0) -> float | None:
    """The x where a white gap begins that parts two columns of running text, if there is one."""
    if len(lines) < 6:
        return None
    spans = sorted((line.box[0], line.box[2]) for line in lines)
    right = spans[0][1]
    for x0, x1 in spans:
        if x0 - right >= narrowest:
            sides = [[s for s in lines if s.box[2] <= right], [s for s in lines if s.box[0] >= x0]]
            if all(_is_prose(side) for side in sides):
                return right
        right = max(right, x1)
    return None


def _is_prose(lines: Sequence[_Line]) -> bool:
    """Running text: at least three lines, and four words on most of them."""
    long = sum(len(line.words) >= 4 for line in lines)
    return long >= 3 and long * 2 > len(lines)


def _region_tokens(lines: Sequence[_Line]) -> list[Token]:
    rows = _rows(lines)
    edges: dict[int, float] = defaultdict(lambda: float("-inf"))
    for line in lines:
        block = line.words[0].block
        edges[block] = max(edges[block], line.box[2])
    tokens: list[Token] = []
    above: list[_Line] = []
    for row in rows:
        gap = _gap_between(above, row, edges) if above else "\n\n"
        for line in row:
            for word in line.words:
                tokens.append(Token(word.text, word.box, gap))
                gap = " "
        above = row
    return tokens


def _rows(lines: Sequence[_Line]) -> list[list[_Line]]:
    """Lines grouped by height, each row from left to right."""
    rows: list[list[_Line]] = []
    middle, height = 0.0, 0.0
    for line in sorted(lines, key=lambda line: line.box[1] + line.box[3]):
        centre = (line.box[1] + line.box[3]) / 2
        tall = line.box[3] - line.box[1]
        if rows and abs(centre - middle) < 0.4 * min(height, tall):
            rows[-1].append(line)
        else:
            rows.append([line])
            middle, height = centre, tall
    return [sorted(row, key=lambda line: line.box[0]) for row in rows]


def _gap_between(above: list[_Line], row: list[_Line], edges: dict[int, float]) -> str:
    """A space where the line above was wrapped, else the end of a line or of a paragraph."""
    last, first = above[-1], row[0]
    height = min(last.box[3] - last.box[1], first.box[3] - first.box[1])
    apart = first.box[1] - last.box[3]
    if len(above) == len(row) == 1 and apart < height:
        word = first.words[0].box
        edge = max(edges[last.words[0].block], edges[first.words[0].block])
        if _is_broken(last.words[-1].text, first.words[0].text):
            return " "
        # A line was wrapped if the next line's first word would not have fitted on it.
        if last.box[2] + (word[2] - word[0]) + 0.25 * height > edge:
            same = last.words[0].block == first.words[0].block
            if same or _runs_on(last.words[-1].text, first.words[0].text):
                return " "
    return "\n" if apart < 0.6 * height else "\n\n"


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


def passages_of(
    tokens: Sequence[Token], limit: int, overlap: int, section: Callable[[Box], str | None]
) -> list[Passage]:
    """Cut tokens into passages of at most ``limit`` words at ends of sentences and paragraphs.

    Empty if all fits into one passage. section: the heading above a box.
    """
    sizes = [_size(token.text) for token in tokens]
    if sum(sizes) <= limit:
        return []
    ends = [i + 1 for i in range(len(tokens)) if _ends_unit(tokens, i)]
    pieces = []
    for start, end in cut(sizes, ends, limit, overlap):
        part = tokens[start:end]
        pieces.append(Passage(text_of(part), union(t.box for t in part), section(part[0].box)))
    return pieces


def cut(
    sizes: Sequence[int], ends: Collection[int], limit: int, overlap: int
) -> list[tuple[int, int]]:
    """Ranges [start, end) over items of the given sizes, none above ``limit`` where possible.

    ends: where a range may end. Ranges are of about equal size; each begins with up to
    ``overlap`` of what the one before ended with.
    """
    ends = frozenset(ends)
    total = sum(sizes)
    fresh = limit - overlap
    target = -(-total // max(1, -(-total // fresh)))
    ranges: list[tuple[int, int]] = []
    start = done = 0
    while done < len(sizes):
        stop = _stop(sizes, ends, done, target, limit - sum(sizes[start:done]))
        ranges.append((start, stop))
        done = stop
        start = _overlap_start(sizes, ends, ranges[-1][0], done, overlap)
    return ranges


def _stop(sizes: Sequence[int], ends: Collection[int], done: int, target: int, room: int) -> int:
    """The end after ``done`` nearest to the target size that keeps within the room."""
    size, best, reach = 0, done, done
    for i in range(done, len(sizes)):
        size += sizes[i]
        if size > room and i > done:
            break
        reach = i + 1
        if reach in ends:
            best = reach
            if size >= target:
                break
    return best if best > done else reach


def _overlap_start(
    sizes: Sequence[int], ends: Collection[int], first: int, done: int, overlap: int
) -> int:
    """The earliest sentence start whose distance to ``done`` is within the overlap."""
    size, start = 0, done
    for i in range(done - 1, first, -1):
        size += sizes[i]
        if size > overlap:
            break
        if i in ends:
            start = i
    return start


def _size(text: str) -> int:
    """Words in a token; scripts without spaces come as long tokens."""
    return 1 if text.isascii() else max(1, len(text) // 8)


def _ends_unit(tokens: Sequence[Token], i: int) -> bool:
    if i + 1 == len(tokens):
        return True
    after = tokens[i + 1]
    return "\n" in after.gap or (
        _SENTENCE_END.search(tokens[i].text) is not None and not after.text[:1].islower()
    )
