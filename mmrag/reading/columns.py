"""Words and lines of a page, and its columns.

Columns are found by cutting a page at white gaps, as the recursive XY cut of Nagy and Seth
("Hierarchical representation of optically scanned documents", 1984) does, but a gap between
columns counts only where both sides are running text: the cells of a table stay in rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmrag.reading.options import Box

# Lengths are in points, or in heights of a line where they are said to be.
_COLUMN_GAP = 8.0  # narrowest white gap between columns; spaces between words are 3 to 5
_TOUCHING = 1.0  # how far lines may overlap and still be one below the other
_BAND_SPACE = 3.0  # line heights between bands that columns may still run through
_LONG = 4  # words of a line that is no cell of a table
_INSIDE_SHARE = 0.2  # of lines of running text that begin inside of a sentence; most have 0.6


@dataclass(frozen=True, slots=True)
class Word:
    """One word as the engine gives it; words of a line share ``block`` and ``line``."""

    text: str
    box: Box
    block: int
    line: int


@dataclass(frozen=True, slots=True)
class Line:
    """Words that the engine gives as one line, and the box around them."""

    words: tuple[Word, ...]
    box: Box


def regions(lines: list[Line]) -> list[list[Line]]:
    """Lines in regions to be read one after the other, each from top to bottom."""
    found: list[list[Line]] = []
    for band in _bands(lines):
        gap = _column_gap(band)
        if gap is None:
            found.append(band)
        else:
            found += regions([line for line in band if line.box[2] <= gap])
            found += regions([line for line in band if line.box[2] > gap])
    return found


def _bands(lines: list[Line]) -> list[list[Line]]:
    """Lines cut into full-width bands; neighbours stay together while columns run through both."""
    bands: list[list[Line]] = []
    for band in _apart(lines):
        if bands and _goes_on(bands[-1], band):
            bands[-1] += band
        else:
            bands.append(band)
    merged: list[list[Line]] = []
    columns = True
    for band in bands:
        alone = _column_gap(band) is not None
        if columns or alone:
            merged.append(band)
        else:
            merged[-1] += band
        columns = alone
    return merged


def _apart(lines: list[Line]) -> list[list[Line]]:
    """Lines in groups, one below the other, that do not overlap in height."""
    groups: list[list[Line]] = []
    bottom = float("-inf")
    for line in sorted(lines, key=lambda line: line.box[1]):
        if line.box[1] >= bottom - _TOUCHING:
            groups.append([])
        groups[-1].append(line)
        bottom = max(bottom, line.box[3])
    return groups


def _goes_on(above: list[Line], band: list[Line]) -> bool:
    """Whether columns run through two bands. Until they have three lines, long ones suffice."""
    space = min(line.box[1] for line in band) - max(line.box[3] for line in above)
    if space >= _BAND_SPACE * max(line.box[3] - line.box[1] for line in band):
        return False
    if _column_gap(above) is not None:
        return _column_gap(above + band) is not None
    sides = _sides(above + band)
    return any(all(_n_long(side) * 2 >= len(side) for side in pair) for pair in sides)


def _column_gap(lines: Sequence[Line]) -> float | None:
    """The x where a white gap begins that parts two columns of running text, if there is one."""
    if len(lines) < 6:
        return None
    for left, right in _sides(lines):
        if _is_prose(left) and _is_prose(right):
            return max(line.box[2] for line in left)
    return None


def _sides(lines: Sequence[Line]) -> Iterator[tuple[list[Line], list[Line]]]:
    """The lines left and right of each white gap that is as wide as one between columns."""
    ordered = sorted(lines, key=lambda line: (line.box[0], line.box[2]))
    right = ordered[0].box[2]
    for i, line in enumerate(ordered):
        if line.box[0] - right >= _COLUMN_GAP:
            yield ordered[:i], ordered[i:]
        right = max(right, line.box[2])


def _is_prose(lines: Sequence[Line]) -> bool:
    """Running text: long lines, at least three, of which some begin inside of a sentence."""
    n_long = _n_long(lines)
    n_inside = sum(_begins_inside(line.words[0].text) for line in lines)
    return n_long >= 3 and n_long * 2 > len(lines) and n_inside >= _INSIDE_SHARE * len(lines)


def _n_long(lines: Sequence[Line]) -> int:
    return sum(len(line.words) >= _LONG for line in lines)


def _begins_inside(text: str) -> bool:
    """Whether a line may go on with a sentence: no capital, number or sign."""
    return text[0].isalpha() and not text[0].isupper()
