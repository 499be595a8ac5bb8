"""Tokens of many texts: counted for some hundreds, and told by the length of the others.

Batches need the cost of a row to about a tenth, and counting every text was most of the first start
with a large file.
"""

from __future__ import annotations

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
    """Tokens over bytes of the texts that were counted; points: of the curve through them."""

    sizes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    points: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

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
            self.points = told, tokens


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
        if curve.points and curve.points[0][0] <= size <= curve.points[0][-1]:
            return round(float(np.interp(size, *curve.points)))
        counted = self._count(text, task)
        curve.add(size, counted)
        return counted
