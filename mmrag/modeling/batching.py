"""Batches cut by tokens, and padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor


def plan_batches(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Group items of similar length so that ``len(batch) * longest`` stays within ``budget``.

    The longest items come first: what does not fit in memory shows at once, not at the end.
    An item longer than the budget has a batch of its own.

    Args:
        costs: tokens of each item.
        budget: tokens of a padded batch.

    Returns: indices into ``costs``, each exactly once.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    batches: list[list[int]] = []
    for index in order:
        # The first item of a batch is its longest, for the order is by falling length.
        if batches and (len(batches[-1]) + 1) * costs[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad(sequences: Sequence[Tensor], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad 1-D id tensors to one length.

    Returns: ids and mask, both (batch, longest), int64; the mask is 1 for real tokens.
    """
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), value, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        part = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), None)
        ids[row, part] = sequence
        mask[row, part] = 1
    return ids, mask


CPU_TOKEN_BUDGET = 1024


GPU_TOKEN_BUDGET = 32768


_BATCHES_AHEAD = 2


T = TypeVar("T")


def prepared(
    pool: ThreadPoolExecutor, batches: Sequence[list[int]], prepare: Callable[[int], T]
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield batches of indices with what ``prepare`` made of each, while threads go on ahead.

    Only a few batches are ready at a time, for images take memory.
    """
    waiting: list[tuple[list[int], list[Future[T]]]] = []
    try:
        for indices in batches:
            waiting.append((indices, [pool.submit(prepare, index) for index in indices]))
            if len(waiting) > _BATCHES_AHEAD:
                ready, futures = waiting.pop(0)
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]
    finally:
        for _, futures in waiting:
            for future in futures:
                future.cancel()
