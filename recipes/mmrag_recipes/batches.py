"""Which rows make up each step: planned ahead from keys and costs alone, so that it can resume.

A batch comes from one data set; its rows cost about the same, so that little is padded; and where
rows see each other's documents, no document of one row answers another, nor do two rows come from
one page. Nothing is decoded to plan, and step n of a run is the same whether the run began at 0 or
resumed at n. A pass begins with a sort; then a step takes a time that depends on the batch alone.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mmrag_recipes.row_file import Keys

# Rows of a bin differ by at most this factor, so that at most a quarter of a batch is padding.
_BIN_GROWTH = 1.3
# tokens; below, rows cost so little that one bin does for all of them.
_FIRST_EDGE = 32.0
# Rows in conflict that a step looks at again, in batches: bounds its time.
_LOOK_BACK = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step: the data set and the indices of the rows in it."""

    dataset: int
    rows: tuple[int, ...]
    epoch: int


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as the planner sees it: keys of its rows, and the cost of each in tokens.

    Rows of a negative cost are left out.
    """

    keys: Keys
    costs: NDArray[np.int32] | Sequence[int]
    weight: float = 1.0
    in_batch: bool = True
    """Whether rows see each other's documents; if not, no two rows can be in conflict."""


def plan(sources: Sequence[Source], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches: data sets drawn by weight times rows, rows without repetition per pass.

    Source: cost bins after MoCa (arXiv 2506.23115), one data set per batch after VLM2Vec-V2
    (arXiv 2507.04590).
    """
    # Its own generator: nothing else that draws may shift the plan.
    chooser = random.Random(seed)
    # By usable rows, so that a data set of which many are left out is not repeated more often.
    shares = [source.weight * int((np.asarray(source.costs) >= 0).sum()) for source in sources]
    # Different seeds, or data sets of one size would be drawn in the same order.
    passes = [_passes(source, batch_size, seed * 1009 + i) for i, source in enumerate(sources)]
    while True:
        dataset = chooser.choices(range(len(sources)), shares)[0]
        epoch, rows = next(passes[dataset])
        yield Batch(dataset, rows, epoch)


def _passes(source: Source, size: int, seed: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    epoch = 0
    while True:
        # By the number of the pass alone, so that a resumed run plans the same one.
        for rows in one_pass(source, size, np.random.default_rng([abs(seed), epoch])):
            yield epoch, rows
        epoch += 1


def one_pass(source: Source, size: int, chance: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """Batches of one pass over a data set, in random order.

    Rows that cannot be placed in a full batch without a conflict wait for the next pass, in
    which the order is another; a data set smaller than ``size`` makes one smaller batch.
    """
    stream = iter(_order(source, size, chance))
    waiting: deque[int] = deque()
    full = False
    while True:
        chosen = _take(waiting, stream, source, size)
        if len(chosen) == size or (chosen and not full):
            yield tuple(chosen)
            full = True
        if len(chosen) < size:
            return


def _order(source: Source, size: int, chance: np.random.Generator) -> list[int]:
    """All rows: chunks of ``size`` rows of like cost, in random order."""
    costs = np.asarray(source.costs)
    order = chance.permutation(np.flatnonzero(costs >= 0))
    growth = np.log(np.maximum(costs[order], _FIRST_EDGE) / _FIRST_EDGE) / np.log(_BIN_GROWTH)
    bins = np.ceil(growth)
    # Begun at any bin: from the cheapest on, the costliest rows would be left over every time.
    first = bins[0] if len(bins) else 0
    order = order[np.lexsort((bins, bins < first))]
    starts = chance.permutation(len(order) // size) * size
    # Random order of the chunks: otherwise a pass would go from cheap rows to costly ones.
    chunks = [order[start : start + size] for start in starts]
    # Last, where a batch that is not full ends the pass.
    rest = order[len(order) // size * size :]
    flat: list[int] = np.concatenate([*chunks, rest]).tolist()
    return flat


def _take(waiting: deque[int], stream: Iterator[int], source: Source, size: int) -> list[int]:
    """Rows without conflict: of those that wait, then of the stream; the others wait."""
    chosen: list[int] = []
    if not source.in_batch:
        return [index for _, index in zip(range(size), stream, strict=False)]
    positives: set[int] = set()
    negatives: set[int] = set()
    queries: set[int] = set()
    places: set[int] = set()
    keys = source.keys
    passed: list[int] = []
    looked_back = min(len(waiting), _LOOK_BACK * size)
    candidates = (waiting.popleft() for _ in range(looked_back))
    for index in chain(candidates, stream):
        own_positives = set(keys.positives[index].tolist())
        own_negatives = set(keys.negatives[index].tolist())
        query, place = int(keys.queries[index]), int(keys.places[index])
        # Two rows may share a negative: it is one for both.
        clash = own_positives & (positives | negatives) or own_negatives & positives
        # The same question answered by another document would be a false negative, and so may
        # anything from one page.
        if clash or query in queries or place in places:
            passed.append(index)
            continue
        chosen.append(index)
        queries.add(query)
        positives |= own_positives
        negatives |= own_negatives
        places |= {place} if place else set()
        if len(chosen) == size:
            break
    # Behind the others, so that every waiting row is looked at again in turn.
    waiting.extend(passed)
    return chosen


def shard(rows: Sequence[int], rank: int, size: int) -> list[int]:
    """Rows of one process: every process gets the same number, and costs are spread evenly."""
    # A gather needs equally many rows of each process; the batch size divides, but for a small data
    # set.
    even = len(rows) - len(rows) % size
    # Every size-th row: rows are sorted by cost within a chunk.
    return list(rows[rank:even:size])
