"""Intervals of means, by a bootstrap over documents.

Questions about one document are alike: they fail together. So documents are drawn, each with all
its questions (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods, section 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Ends of the interval then move by less than a hundredth from seed to seed.
_DRAWS = 2000


def interval(
    values: NDArray[np.float64], documents: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper end of the 95 % interval of the mean of each column.

    The draws are the same in every call, so that equal values give equal intervals.

    Args:
        values: (n questions, n metrics); differences of two systems for a paired bootstrap.
        documents: the document of each question.

    Returns:
        Two arrays, (n metrics,) each; NaN for fewer than two documents, which tell nothing.
    """
    names, owner = np.unique(np.asarray(documents, dtype=str), return_inverse=True)
    if len(names) < 2:
        unknown = np.full(values.shape[1], np.nan)
        return unknown, unknown
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, owner, values)
    counts = np.bincount(owner, minlength=len(names))
    # (draws, documents)
    drawn = np.random.default_rng(0).integers(0, len(names), (_DRAWS, len(names)))
    # Documents differ in their number of questions, so a draw divides by its own.
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1, keepdims=True)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high
