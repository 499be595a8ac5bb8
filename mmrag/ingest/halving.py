"""Embedding a batch in which some items may be bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mmrag.errors import ContentError

C = TypeVar("C")
T = TypeVar("T")


def each_or_error(
    encode: Callable[[Sequence[C]], Sequence[T]], contents: Sequence[C]
) -> list[T | ContentError]:
    """What ``encode`` makes of each content; a bad one is found by halving the batch."""
    if not contents:
        return []
    try:
        return [*encode(contents)]
    except ContentError as error:
        if len(contents) == 1:
            return [error]
    half = len(contents) // 2
    return each_or_error(encode, contents[:half]) + each_or_error(encode, contents[half:])
