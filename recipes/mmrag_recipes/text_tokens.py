"""Tokens of many texts: counted for some hundreds, and told by the length of the others.

Batches need the cost of a row to about a tenth, and counting every text was most of the first start
with a large file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_COUNTED = 400  # texts of a task that are counted before lengths tell
_GROUPS = 20  # of like length, of which each gives one point of the curve
# Rows of one batch may differ by 30 % (``batches``), so that a tenth changes little.
_DEVIATION = 0.1


@dataclass
class _Curve:
    """Tokens over bytes of the texts that were counted.

    tokens: of each size from ``first`` on, where the counted texts tell it.
    """

    sizes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    first: int = 0
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, size: int, count: int) -> None:
        """Take in a text; the last one that is wanted makes the curve."""
        if len(self.sizes) == _COUNTED:
            return
        self.sizes.append(size)
        self.counts.append(count)
        if len(self.sizes) < _COUNTED:
            return
        sizes, counts = np.array(self.sizes, dtype=float), np.array(self.counts, dtype=float)
        groups = np.array_split(np.argsort(sizes, kind="stable"), _GROUPS)
        means = [(sizes[group].mean(), counts[group].mean()) for group in groups]
        told, tokens = (np.array(column) for column in zip(*means, strict=True))
        error = np.abs(np.interp(sizes, told, tokens) - counts) / counts
        # Several languages in one file, or code beside prose: length does not tell.
        if error.mean() <= _DEVIATION:
            self.first = math.ceil(told[0])
            known = np.arange(self.first, math.floor(told[-1]) + 1)
            self.tokens = np.rint(np.interp(known, told, tokens)).astype(np.int64)


class TextTokens:
    """Tokens of texts by their lengths, once enough of a task were counted.

    Where texts of one length differ by more than a tenth, each is counted. So is one that is
    shorter or longer than those before.

    >>> tokens = TextTokens(lambda text, task: len(text.split()))
    >>> tokens("one two three", None)
    3
    """

    def __init__(self, count: Callable[[str, str | None], int]) -> None:
        self._count = count
        self._curves: defaultdict[str | None, _Curve] = defaultdict(_Curve)

    def __call__(self, text: str, task: str | None) -> int:
        """Tokens of a text with the instruction of a task, or of a document (None)."""
        size = len(text.encode())
        curve = self._curves[task]
        place = size - curve.first
        if 0 <= place < len(curve.tokens):
            return int(curve.tokens[place])
        counted = self._count(text, task)
        curve.add(size, counted)
        return counted
