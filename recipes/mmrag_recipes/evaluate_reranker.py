"""How well a reranker orders the positives and negatives of rows.

    python -m mmrag_recipes evaluate_reranker dev-mined.jsonl --model Qwen/Qwen3-VL-Reranker-2B

The candidates of a row are its own positives and negatives, so that mined rows ask for what is
hard.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence

from mmrag.evaluation.metrics import Metrics, average, metrics_of
from mmrag.rerankers import load_scorer
from mmrag.rerankers.base import Scorer
from mmrag_recipes.config_reranker import EvaluateRerankerConfig
from mmrag_recipes.evaluate import show
from mmrag_recipes.rows import ImageStore, Row, read_rows, store_of

logger = logging.getLogger("mmrag_recipes")


def evaluate_scorer(scorer: Scorer, rows: Sequence[Row], store: ImageStore) -> dict[str, Metrics]:
    """Metrics of each row's candidates by score, per modality pair and ``all``.

    Rows without negatives are left out: any order of theirs is right. A candidate that cannot be
    judged comes last.
    """
    results: dict[str, list[Metrics]] = defaultdict(list)
    for row in rows:
        if not row.negatives:
            continue
        # Negatives first: among equal scores a positive must not come first by its place.
        items = [*row.negatives, *row.positives]
        query = store.content(row.query)
        outcomes = scorer.judge([(query, store.content(item)) for item in items], row.instruction)
        scores = [one if isinstance(one, float) else -math.inf for one in outcomes]
        for failed in (one for one in outcomes if not isinstance(one, float)):
            logger.warning("row %s: a candidate is not judged: %s", row.id, failed)
        order = sorted(range(len(items)), key=lambda place: -scores[place])
        relevant = {place: 1.0 for place in range(len(row.negatives), len(items))}
        metrics = metrics_of(order, relevant)
        results[row.pair].append(metrics)
        results["all"].append(metrics)
    return {pair: average(found) for pair, found in sorted(results.items())}


def run(options: EvaluateRerankerConfig) -> None:
    """Command: evaluate a reranker on rows."""
    scorer = load_scorer(options.model, kind=options.kind)
    rows, store = read_rows(options.rows), store_of(options.rows)
    show(evaluate_scorer(scorer, rows, store), as_json=options.as_json)
