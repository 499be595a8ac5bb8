"""Inputs of the coming steps, prepared by threads while a step runs, within a bound on memory."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mmrag.processes import usable_cores
from mmrag_recipes import distributed
from mmrag_recipes.batches import Batch, shard
from mmrag_recipes.data import Dataset

MOST_BYTES = 2 * 2**30
"""Bytes of inputs that wait, beside those of the step that runs."""
_MOST_STEPS = 8


class Weighed(Protocol):
    """Inputs of a step."""

    @property
    def n_bytes(self) -> int:
        """Memory of the inputs."""
        ...


W = TypeVar("W")
S = TypeVar("S", bound=Weighed)


def prepare_ahead(
    batches: Iterable[Batch],
    begin: Callable[[Batch, ThreadPoolExecutor], tuple[W, int]],
    collect: Callable[[Batch, W], S],
    most_bytes: int,
) -> Iterator[tuple[Batch, S]]:
    """Batches with their inputs, in order.

    Args:
        begin: lets the inputs of a batch be prepared; gives what to wait for, and its tokens.
        collect: waits for them.
        most_bytes: of inputs that wait.
    """
    coming = iter(batches)
    ahead: deque[tuple[Batch, W, int]] = deque()
    bytes_per_token = 0.0  # the most of any step so far
    # The processes of one machine share its cores.
    threads = max(1, usable_cores() // distributed.local_size())
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:

        def submit() -> None:
            # The size of the first is not known beforehand.
            while len(ahead) < (_MOST_STEPS if bytes_per_token else 1):
                expected = sum(tokens for *_, tokens in ahead) * bytes_per_token
                if (ahead and expected > most_bytes) or (batch := next(coming, None)) is None:
                    return
                ahead.append((batch, *begin(batch, pool)))

        try:
            while True:
                submit()
                if not ahead:
                    return
                batch, waiting, tokens = ahead.popleft()
                step = collect(batch, waiting)
                # Pixels differ widely from step to step; the largest ratio is the safe one.
                bytes_per_token = max(bytes_per_token, step.n_bytes / tokens)
                # What comes next is prepared while this step runs.
                submit()
                yield batch, step
        finally:
            # A training that stops must not wait for steps that nobody will run.
            pool.shutdown(cancel_futures=True)


def own_rows(batch: Batch) -> list[int]:
    """The rows of a batch that this process works on."""
    return shard(batch.rows, distributed.rank(), distributed.size())


def tokens_of(dataset: Dataset, rows: Sequence[int]) -> int:
    """Tokens of some rows, at least 1."""
    return max(1, sum(int(dataset.costs[index]) for index in rows))


def bytes_of(prepared: Any) -> int:
    """Memory of the tensors of a prepared input, a dataclass."""
    values = (getattr(prepared, field.name) for field in dataclasses.fields(prepared))
    flat = (one for value in values for one in (value if isinstance(value, tuple) else (value,)))
    return sum(one.nbytes for one in flat if isinstance(one, Tensor))
