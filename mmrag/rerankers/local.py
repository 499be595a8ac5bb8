"""Rerankers that run here: one skeleton of batching, memory and errors for all models.

What differs between models is an ``Asker``: how a pair is written, cut, prepared and scored.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmrag.content import Content
from mmrag.errors import ModelError, naming
from mmrag.instructions import resolve
from mmrag.modeling.batching import (
    Sized,
    default_budget,
    default_workers,
    iter_batches,
    open_pool,
    prepared,
    run_halving,
)
from mmrag.modeling.loading import is_out_of_memory
from mmrag.rerankers.base import Outcome, Pair, isolate, refuse_clips, sigmoid


@dataclass(frozen=True, slots=True)
class Group:
    """Pairs that go through the model together, by their places in the call.

    query: what they have in common, if anything.
    shared: ids at the start of each that are computed once for all.
    """

    places: list[int]
    query: Content | None = None
    shared: int = 0


class Asker(Protocol):
    """One kind of model that judges pairs. ``plan`` and ``prepare`` run in threads."""

    model: torch.nn.Module

    def plan(self, pair: Pair, task: str | None) -> Any:
        """A pair as the model will see it, with ``n_tokens``. Raises ContentError."""
        ...

    def groups(self, pairs: Sequence[Pair], plans: Sequence[Any]) -> list[Group]:
        """All places, each in one group."""
        ...

    def prefix(self, group: Group, first: Any) -> Any:
        """What the pairs of a group share, computed from the plan of one; None for nothing."""
        ...

    def prepare(self, plan: Any, group: Group) -> Any:
        """Inputs of one pair, with ``n_tokens``. Raises ContentError for a broken image."""
        ...

    def forward(self, batch: Sequence[Any], group: Group, prefix: Any) -> Tensor:
        """Logit of yes minus that of no for each item, (len(batch),), float32."""
        ...


class LocalScorer:
    """A Scorer that runs an Asker in this process.

    ``token_budget`` bounds a batch: its number of pairs times its longest sequence, in tokens,
    visual ones included; None is 1,024 on the CPU and 16,384 elsewhere. ``workers`` threads
    prepare ahead of the model; None is one for each core, at most 16. Safe to call from several
    threads: the model runs one batch at a time.

    >>> from mmrag.rerankers import load_scorer
    >>> scorer = load_scorer("Qwen/Qwen3-VL-Reranker-2B")  # doctest: +SKIP
    >>> scorer.judge([(Content("wind energy"), Content("Turbines make power."))])  # doctest: +SKIP
    [0.91]
    """

    def __init__(
        self,
        asker: Asker,
        *,
        name: str,
        token_budget: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.asker = asker
        self.name = name
        self.budget = default_budget(asker.model, token_budget)
        self.workers = default_workers(workers)
        # One batch at a time: two at once would need the memory of both.
        self._lock = threading.Lock()

    def score(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """Probability of yes against no for each pair, (len(pairs),), in the order of ``pairs``.

        Pairs with the same query share what they can.

        Raises:
            ContentError: For a pair that cannot be used (its index is in the message).
            ModelError: For one that does not fit in memory.
        """
        # Of the difference of two logits: the softmax over yes and no.
        return sigmoid(self.logits(pairs, instruction))

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """As ``score``, with the error of each pair that cannot be used in its place."""
        return isolate(lambda some: self.score(some, instruction), pairs)

    def logits(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """What ``score`` takes the sigmoid of: the logit of yes minus that of no.

        Raises:
            ModelError: For a logit that is not finite.
        """
        task = resolve(instruction)
        logits = np.zeros(len(pairs), dtype=np.float32)

        def plan(place: int) -> Any:
            query = pairs[place][0]
            # A query may bring its task along; that of the call is for those without.
            own = resolve(query.instruction) if query else None
            with naming(f"pair {place}"):
                refuse_clips(pairs[place])
                return self.asker.plan(pairs[place], own or task)

        with open_pool(self.workers, len(pairs)) as pool:
            # All before the first batch: groups and batches are formed by length.
            plans = list(pool.map(plan, range(len(pairs))))
            for group in self.asker.groups(pairs, plans):
                self._run(group, plans, logits, pool)
        # NaN would sort anywhere, without an error.
        if not np.isfinite(logits).all():
            raise ModelError(
                f"{self.name}: a score is not finite; load the model with dtype='float32'."
            )
        return logits

    def _run(
        self,
        group: Group,
        plans: Sequence[Any],
        logits: NDArray[np.float32],
        pool: Executor,
    ) -> None:
        """Fill in the logits of one group."""
        # Once for the query: for a page image it is most of the work.
        prefix = self._prefix(group, plans[group.places[0]])

        def prepare(index: int) -> Sized:
            place = group.places[index]
            with naming(f"pair {place}"):
                prepared_pair: Sized = self.asker.prepare(plans[place], group)
                return prepared_pair

        def forward(batch: Sequence[Sized]) -> NDArray[np.float32]:
            with self._lock, torch.inference_mode():
                return self.asker.forward(batch, group, prefix).cpu().numpy()

        costs = [plans[place].n_tokens for place in group.places]
        # A function: the limit is lowered when a batch does not fit in memory.
        batches = iter_batches(costs, lambda: self.budget.limit)
        for some, inputs in prepared(pool, batches, prepare):
            places = [group.places[index] for index in some]
            logits[places] = run_halving(forward, inputs, self.budget, self.name)

    def _prefix(self, group: Group, first: Any) -> Any:
        if not group.shared:
            return None
        try:
            with self._lock, torch.inference_mode():
                return self.asker.prefix(group, first)
        except (RuntimeError, MemoryError) as error:
            # torch raises a RuntimeError for much else.
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.name}: a query of {group.shared} tokens does not fit in memory; lower "
                "max_image_tokens, or use a smaller dtype."
            ) from error
