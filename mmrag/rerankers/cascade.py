"""How deep to rerank, and in which order the results come.

A judge costs far more than retrieval, and most of what it is shown deep down the ranking never
reaches the top. Candidates are therefore judged in steps, from the first of the ranking on, and
judging stops when

- a whole step stayed at least ``settle`` below the ``top_n``-th best score so far: the gap
  between what is kept and what still comes has settled; or
- ``max_depth`` candidates were judged; or
- the next step would pass the budget of time or tokens. A step is made smaller to fit. Time is
  predicted from the pace so far, so that only the first step can pass it.

Candidates are in the order of retrieval, so what comes later is less likely still; the rule is a
wager, not a proof, and ``settle=None`` judges all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmrag.errors import ConfigError
from mmrag.rerankers.base import Outcome


@dataclass(frozen=True, slots=True)
class Depth:
    """Limits of one cascade; None is no limit.

    step: candidates judged together.
    settle: gap of scores, in (0, 1].

    Raises:
        ConfigError: For values that make no sense.
    """

    top_n: int | None = None
    step: int = 8
    settle: float | None = None
    max_depth: int | None = None
    budget_ms: float | None = None
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_n", "step", "max_depth", "budget_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1, or None.")
        if self.budget_ms is not None and self.budget_ms <= 0:
            raise ConfigError(f"budget_ms={self.budget_ms}: give more than 0, or None.")
        if self.settle is not None and not 0 < self.settle <= 1:
            raise ConfigError(f"settle={self.settle}: it is a gap of scores, in (0, 1].")
        if self.settle is not None and self.top_n is None:
            raise ConfigError("settle needs top_n: without it every result is kept.")

    @property
    def stepwise(self) -> bool:
        """Whether anything can stop the cascade between two steps."""
        return (self.settle, self.budget_ms, self.budget_tokens) != (None, None, None)


def judge_in_steps(
    judge: Callable[[Sequence[int]], Sequence[Outcome]],
    costs: Sequence[int],
    depth: Depth,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Outcome], str | None]:
    """Outcomes of the candidates that were judged, from the first on, and why no more were.

    Args:
        judge: takes the indices of one step.
        costs: tokens of each candidate.
        clock: seconds.
    """
    outcomes: list[Outcome] = []
    most = min(len(costs), depth.max_depth or len(costs))
    started, spent = clock(), 0
    while (done := len(outcomes)) < most:
        # Nothing could stop it in between, so one large batch is fastest.
        size = min(depth.step, most - done) if depth.stepwise else most
        if depth.budget_ms is not None and done:
            passed = (clock() - started) * 1000
            # From the pace of what was judged: models and pages differ too much for a constant.
            size = min(size, int((depth.budget_ms - passed) / max(passed / done, 1e-9)))
            if size < 1:
                return outcomes, f"the budget of {depth.budget_ms:g} ms is spent"
        if depth.budget_tokens is not None:
            size = _affordable(costs[done : done + size], depth.budget_tokens - spent)
            if size < 1:
                return outcomes, f"the budget of {depth.budget_tokens} tokens is spent"
        spent += sum(costs[done : done + size])
        outcomes.extend(judge(range(done, done + size)))
        if is_settled(outcomes, size, depth) and len(outcomes) < most:
            return outcomes, f"the scores settled after {len(outcomes)}"
    return outcomes, None if most == len(costs) else f"max_depth={depth.max_depth} is reached"


def is_settled(outcomes: Sequence[Outcome], last: int, depth: Depth) -> bool:
    """Whether the ``last`` outcomes all stayed ``settle`` below the ``top_n``-th best score."""
    if depth.settle is None or depth.top_n is None:
        return False
    before = [score for score in outcomes[:-last] if isinstance(score, float)]
    fresh = [score for score in outcomes[-last:] if isinstance(score, float)]
    # A pair that failed might have been the best: it is no evidence.
    if len(before) < depth.top_n or len(fresh) < last:
        return False
    kept = sorted(before, reverse=True)[depth.top_n - 1]
    return kept - max(fresh) >= depth.settle


def final_order(scores: Sequence[float | None]) -> list[int]:
    """Indices in their final order: by falling score; what has none keeps its place.

    Equal scores stay in the order of retrieval.
    """
    judged = [index for index, score in enumerate(scores) if score is not None]
    best_first = iter(sorted(judged, key=lambda index: (-(scores[index] or 0.0), index)))
    # What was not judged is not known to be bad: retrieval's place is the best guess.
    return [i if score is None else next(best_first) for i, score in enumerate(scores)]


def filled(scores: Sequence[float | None]) -> list[float | None]:
    """Scores in final order where what has none takes that of its neighbour above, else below.

    So they fall from first to last, on one scale. All None stay None.
    """
    first = next((score for score in scores if score is not None), None)
    result: list[float | None] = []
    for score in scores:
        first = first if score is None else score
        result.append(first)
    return result


def _affordable(costs: Sequence[int], left: int) -> int:
    for count, cost in enumerate(costs):
        left -= cost
        if left < 0:
            return count
    return len(costs)
