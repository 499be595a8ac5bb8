"""Metrics of rankings, by the names that benchmarks use.

``hit@k`` (some right document in the first k), ``recall@k``, ``p@1``, ``mrr@k``, ``ndcg@k`` (gain
2^relevance - 1, as BEIR's and MTEB's exponential form) and ``ndcg_linear@k`` (gain = relevance, as
trec_eval and MMEB-V2's visual documents). With relevance 0 or 1 both nDCGs are the same number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmrag.errors import ContentError

CUTS = (1, 5, 10)
Metrics = dict[str, float]


def metrics_of(
    ranked: Sequence[Any], relevant: Mapping[Any, float], cuts: Sequence[int] = CUTS
) -> Metrics:
    """Metrics of one ranking.

    Args:
        ranked: ids, best first; as long as the deepest cut or longer.
        relevant: relevance of each right id, above 0.
        cuts: the values of k, ascending.

    Raises:
        ContentError: If nothing is relevant.
    """
    if not relevant:
        raise ContentError("A query without any relevant document cannot be scored.")
    gains = [relevant.get(item, 0.0) for item in ranked]
    first = next((rank for rank, gain in enumerate(gains, 1) if gain > 0), None)
    found: Metrics = {"p@1": float(gains[:1] != [] and gains[0] > 0)}
    for cut in cuts:
        right = sum(gain > 0 for gain in gains[:cut])
        found[f"hit@{cut}"] = float(right > 0)
        found[f"recall@{cut}"] = right / len(relevant)
    deepest = cuts[-1]
    found[f"mrr@{deepest}"] = 1 / first if first and first <= deepest else 0.0
    best = sorted(relevant.values(), reverse=True)
    for cut in (each for each in cuts if each > 1):  # at 1 it is no other number than hit@1
        found[f"ndcg@{cut}"] = _dcg(gains, cut, True) / _dcg(best, cut, True)
        found[f"ndcg_linear@{cut}"] = _dcg(gains, cut, False) / _dcg(best, cut, False)
    return found


def _dcg(gains: Sequence[float], cut: int, exponential: bool) -> float:
    """Discounted cumulative gain (Jarvelin and Kekalainen 2002; exponential: Burges 2005)."""
    return sum(
        (2**gain - 1 if exponential else gain) / math.log2(rank + 1)
        for rank, gain in enumerate(gains[:cut], 1)
    )


def average(results: Sequence[Metrics]) -> Metrics:
    """Mean of each metric over queries, and their number ``n``."""
    names = results[0] if results else {}
    means = {name: float(np.mean([metrics[name] for metrics in results])) for name in names}
    return {**means, "n": float(len(results))}
