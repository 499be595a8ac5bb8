"""Batches cut by tokens, prepared ahead in threads, and halved where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.loading import is_out_of_memory
from mmrag.processes import preparing_threads

logger = logging.getLogger(__name__)

# A CPU gains nothing from larger batches, which cost cache and padding. On an H200, 8 pages at a
# time are as fast as 24, and the first batch is prepared sooner.
CPU_TOKEN_BUDGET = 1024
GPU_TOKEN_BUDGET = 16384
# Few, for decoded images take memory.
_BATCHES_AHEAD = 2
_FIRST_PATIENCE = 4  # batches that must fit before a lowered budget is raised again


class Sized(Protocol):
    """Anything with a length in tokens."""

    @property
    def n_tokens(self) -> int:
        """Length of the sequence the decoder sees, visual tokens included."""
        ...


T = TypeVar("T")
S = TypeVar("S", bound=Sized)


class TokenBudget:
    """Tokens of a padded batch: lowered where memory runs out, raised again while it suffices.

    Memory is often short for a moment only, because another process takes it. The budget is
    halved at each failure and doubled after a few batches that fit: after 4 at first, after
    twice as many each time that the raised budget fails again.

    full: the budget to start with, and the highest. Less than 1 raises ConfigError.

    >>> budget = TokenBudget(32768)
    >>> budget.exceeded(20000)
    >>> budget.limit
    10000
    """

    def __init__(self, full: int) -> None:
        if full < 1:
            raise ConfigError(f"token_budget={full}: give at least 1.")
        # Without a lock, though threads may share one: a lost update costs a batch of another
        # size, no more.
        self.full = self.limit = full
        self._fits = 0
        self._patience = _FIRST_PATIENCE
        self._raised = self._warned = False

    def fitted(self) -> None:
        """Count a batch that fitted."""
        self._fits += 1
        if self.limit < self.full and self._fits >= self._patience:
            self.limit, self._fits = min(self.full, 2 * self.limit), 0
            self._raised = True

    def exceeded(self, tokens: int) -> None:
        """Note that a batch of so many tokens did not fit."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "Out of memory with a batch of %d tokens: smaller batches are run for a while. "
                "token_budget=%d avoids this.",
                tokens,
                max(1, tokens // 2),
            )
        # It was raised too early: wait twice as long before the next try.
        if self._raised:
            self._patience *= 2
        self.limit, self._fits, self._raised = max(1, min(self.limit, tokens) // 2), 0, False


def default_budget(model: torch.nn.Module, asked: int | None) -> TokenBudget:
    """The budget asked for, or the usual one of the device that the model is on."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    usual = CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET
    return TokenBudget(usual if asked is None else asked)


def default_workers(asked: int | None) -> int:
    """Threads that prepare: as asked, or one for each core that this process may use, up to 16.

    Raises:
        ConfigError: For less than 1.
    """
    if asked is None:
        return preparing_threads()
    if asked < 1:
        raise ConfigError(f"workers={asked}: give at least 1.")
    return asked


class _Inline(Executor):
    """Runs what it is given at once: starting a thread takes longer than tokenising a query."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def open_pool(workers: int, n: int) -> Executor:
    """Threads to prepare ``n`` items in; for a single one there is nothing to run beside."""
    if n == 1:
        return _Inline()
    return ThreadPoolExecutor(workers, thread_name_prefix="mmrag-prepare")


def iter_batches(costs: Sequence[int], limit: Callable[[], int]) -> Iterator[list[int]]:
    """Group items of similar length so that ``len(batch) * longest`` stays within ``limit()``.

    An item longer than the limit has a batch of its own.

    Args:
        costs: tokens of each item.
        limit: tokens of a padded batch, at the moment.

    Yields:
        Indices into ``costs``, each exactly once.
    """
    # The longest first: what does not fit in memory shows at once, not at the end.
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    start = 0
    while start < len(order):
        longest = max(1, costs[order[start]])
        # Asked for each time: what is left is planned anew where the limit fell.
        size = max(1, limit() // longest)
        yield order[start : start + size]
        start += size


def prepared(
    pool: Executor, batches: Iterable[list[int]], prepare: Callable[[int], T]
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield batches of indices with what ``prepare`` made of each, while threads go on ahead."""
    waiting: list[tuple[list[int], list[Future[T]]]] = []
    try:
        for indices in batches:
            waiting.append((indices, [pool.submit(prepare, index) for index in indices]))
            if len(waiting) > _BATCHES_AHEAD:
                ready, futures = waiting.pop(0)
                yield ready, [future.result() for future in futures]
        while waiting:
            ready, futures = waiting.pop(0)
            yield ready, [future.result() for future in futures]
    finally:
        # A consumer that stops early leaves batches behind that nobody will ask for.
        for _, futures in waiting:
            for future in futures:
                future.cancel()


def padded_tokens(batch: Sequence[Sized]) -> int:
    """Tokens of a batch whose items are padded to the longest."""
    return len(batch) * max(item.n_tokens for item in batch)


def run_halving(
    forward: Callable[[Sequence[S]], NDArray[np.float32]],
    inputs: Sequence[S],
    budget: TokenBudget,
    name: str,
) -> NDArray[np.float32]:
    """Results of one batch, halved as often as memory asks for; ``budget`` learns from it.

    Raises:
        ModelError: If a single item does not fit, at the second try with memory freed.
    """
    tokens = padded_tokens(inputs)
    # What was prepared before the budget fell is too large now.
    if len(inputs) == 1 or tokens <= budget.limit:
        for last_try in (False, True) if len(inputs) == 1 else (False,):
            try:
                result = forward(inputs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if last_try:
                    raise ModelError(
                        f"{name}: one item of {tokens} tokens does not fit in memory; lower "
                        "max_image_tokens or max_length, or use a smaller dtype."
                    ) from error
            else:
                budget.fitted()
                return result
            # Outside of the handler: the traceback would keep the failed tensors alive.
            budget.exceeded(tokens)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    middle = len(inputs) // 2
    halves = (inputs[:middle], inputs[middle:])
    return np.concatenate([run_halving(forward, half, budget, name) for half in halves])


def pad(sequences: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Pad 1-D id tensors to one length, on the right.

    Returns:
        Ids and mask, both (batch, longest), int64; the mask is 1 for real tokens.
    """
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), value, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``; to CUDA from pinned memory, so that nothing waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
