"""Which rows make up each step: planned ahead from ids and costs alone, so that it can resume.

A batch comes from one data set; its rows cost about the same, so that little is padded; and where
rows see each other's documents, no document of one row answers another, nor do two rows come from
one page. Nothing is decoded to plan, and step n of a run is the same whether the run began at 0 or
resumed at n.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmrag_recipes.rows import Row

_BIN_GROWTH = 1.3


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step: the data set and the indices of the rows in it."""

    dataset: int
    rows: tuple[int, ...]
    epoch: int


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as the planner sees it: rows and the cost of each, in tokens."""

    rows: Sequence[Row]
    costs: Sequence[int]
    weight: float = 1.0
    in_batch: bool = True
    """Whether rows see each other's documents; if not, no two rows can be in conflict."""


def plan(sources: Sequence[Source], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches: data sets drawn by weight times rows, rows without repetition per pass.

    Source: cost bins after MoCa (arXiv 2506.23115), one data set per batch after VLM2Vec-V2
    (arXiv 2507.04590).
    """
    chooser = random.Random(seed)
    shares = [source.weight * len(source.rows) for source in sources]
    passes = [_passes(source, batch_size, seed * 1009 + i) for i, source in enumerate(sources)]
    while True:
        dataset = chooser.choices(range(len(sources)), shares)[0]
        epoch, rows = next(passes[dataset])
        yield Batch(dataset, rows, epoch)


def _passes(source: Source, size: int, seed: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    epoch = 0
    while True:
        for rows in one_pass(source, size, random.Random(f"{seed}/{epoch}")):
            yield epoch, rows
        epoch += 1


def one_pass(source: Source, size: int, chance: random.Random) -> list[tuple[int, ...]]:
    """Batches of one pass over a data set, in random order.

    Rows that cannot be placed in a full batch without a conflict wait for the next pass, in
    which the order is another; a data set smaller than ``size`` makes one smaller batch.
    """
    order = list(range(len(source.rows)))
    chance.shuffle(order)
    bins = [_bin(cost) for cost in source.costs]
    # Begun at any bin: from the cheapest on, the costliest rows would be left over every time.
    first = bins[order[0]] if order else 0
    order.sort(key=lambda index: (bins[index] < first, bins[index]))
    waiting = deque(order)
    batches: list[tuple[int, ...]] = []
    while waiting:
        chosen = _take(waiting, source, size)
        if len(chosen) == size or not batches:
            batches.append(tuple(chosen))
        if len(chosen) < size:
            break
    chance.shuffle(batches)
    return batches


def _take(waiting: deque[int], source: Source, size: int) -> list[int]:
    """Take rows without conflict from the front; rows passed over go back to the front."""
    if not source.in_batch:
        return [waiting.popleft() for _ in range(min(size, len(waiting)))]
    chosen: list[int] = []
    passed: list[int] = []
    positives: set[int] = set()
    negatives: set[int] = set()
    queries: set[int] = set()
    places: set[str] = set()
    while waiting and len(chosen) < size:
        index = waiting.popleft()
        row = source.rows[index]
        own_positives = {item.key for item in row.positives}
        own_negatives = {item.key for item in row.negatives}
        clash = own_positives & (positives | negatives) or own_negatives & positives
        if clash or row.query.key in queries or row.place in places:
            passed.append(index)
            continue
        chosen.append(index)
        queries.add(row.query.key)
        positives |= own_positives
        negatives |= own_negatives
        places |= {row.place} if row.place else set()
    waiting.extendleft(reversed(passed))
    return chosen


def _bin(cost: int) -> int:
    """Number of the cost bin: each holds costs within a factor of 1.3."""
    step, edge = 0, 32.0
    while cost > edge:
        edge *= _BIN_GROWTH
        step += 1
    return step


def shard(rows: Sequence[int], rank: int, size: int) -> list[int]:
    """Rows of one process: every process gets the same number, and costs are spread evenly."""
    even = len(rows) - len(rows) % size
    return list(rows[rank:even:size])
