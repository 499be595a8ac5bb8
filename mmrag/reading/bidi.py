"""The order of words in a row that has Hebrew or Arabic, as Unicode's annex 9 has it for letters.

The engine gives the letters of each word in the order they are read in; the words of a row may
come in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal, TypeAlias, TypeVar

from mmrag.reading.characters import is_left_to_right, is_right_to_left

Item = TypeVar("Item")
Direction: TypeAlias = Literal["left", "right", "none"]


def in_reading_order(words: Sequence[Item], text: Callable[[Item], str]) -> list[Item]:
    """Words that come as they stand on the page, from left to right, as they are read.

    text: the text of a word. A row with more words of a script that runs to the left is read
    from its right end; words of the other direction keep theirs among themselves.
    """
    own = [_direction(text(word)) for word in words]
    # By number and not by the first word, which is often a Latin name in a Hebrew row.
    base: Direction = "left" if own.count("left") > own.count("right") else "right"
    runs = [
        (direction, [word for word, _ in run])
        for direction, run in groupby(
            zip(words, _directions(own, base), strict=True), key=lambda pair: pair[1]
        )
    ]
    if base == "left":
        runs.reverse()
    return [
        word for direction, run in runs for word in (reversed(run) if direction == "left" else run)
    ]


def _direction(text: str) -> Direction:
    """Where a word runs; a number or a mark runs nowhere by itself."""
    if is_right_to_left(text):
        return "left"
    return "right" if is_left_to_right(text) else "none"


def _directions(own: Sequence[Direction], base: Direction) -> list[Direction]:
    """Directions with those of numbers and marks filled in.

    Between two words of one direction they share it, and what stands behind a Latin word
    belongs to it (``Python 3``); others run as the row does.
    """
    before = _last_known(own, base)
    after = _last_known(own[::-1], base)[::-1]
    resolved: list[Direction] = []
    for i, direction in enumerate(own):
        if direction == "none":
            behind_latin = i > 0 and own[i - 1] == "right"
            shared = before[i] == after[i + 1]
            direction = before[i] if shared or behind_latin else base
        resolved.append(direction)
    return resolved


def _last_known(own: Sequence[Direction], base: Direction) -> list[Direction]:
    """Before each word, and behind the last: the direction of the last word that has one."""
    known = [base]
    for direction in own:
        known.append(known[-1] if direction == "none" else direction)
    return known
