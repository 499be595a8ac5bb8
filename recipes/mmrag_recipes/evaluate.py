"""Retrieval metrics on rows, per modality pair and dimension.

    python -m mmrag_recipes evaluate rows.jsonl --model mmrag-nano --dims 384 128

The metrics are those of ``mmrag.evaluation.metrics``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder, check_dim, truncate_normalise
from mmrag.evaluation.metrics import CUTS, Metrics, average, metrics_of
from mmrag.instructions import resolve
from mmrag_recipes.config import EvaluateConfig
from mmrag_recipes.rows import ImageStore, Row, corpus_of, read_rows, store_of
from mmrag_recipes.vectors import nearest


def rank(
    queries: NDArray[np.float32], documents: NDArray[np.float32], depth: int
) -> NDArray[np.int64]:
    """Indices of the ``depth`` nearest documents of each query, best first: (b, depth).

    Equal scores keep the order of the documents, so that a ranking does not depend on chance.
    """
    found = [order for order, _ in nearest(queries, documents, depth)]
    return np.stack(found) if found else np.zeros((0, depth), dtype=np.int64)


def evaluate_rows(
    embedder: Embedder, rows: Sequence[Row], store: ImageStore, dim: int | None = None
) -> dict[str, Metrics]:
    """Rank the corpus of all rows for each query. Returns metrics per modality pair and ``all``.

    The corpus is one: a text question competes against every text, image and page.
    """
    corpus = corpus_of(rows)
    kept = check_dim(dim, embedder.dim)
    # In full, and cut below: one embedding serves every dimension of a ranking.
    documents = embedder.encode([store.content(item) for item in corpus])
    position = {item.key: index for index, item in enumerate(corpus)}
    asked: dict[str | None, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        # One call for each instruction, so that batches are full.
        asked[resolve(row.instruction)].append(index)
    ranked: dict[int, NDArray[np.int64]] = {}
    for instruction, indices in asked.items():
        contents = [store.content(rows[index].query) for index in indices]
        queries = truncate_normalise(embedder.encode(contents, instruction), kept)
        order = rank(queries, truncate_normalise(documents, kept), CUTS[-1])
        ranked.update(zip(indices, order, strict=True))
    results: dict[str, list[Metrics]] = defaultdict(list)
    for index, row in enumerate(rows):
        relevant = {position[item.key]: 1.0 for item in row.positives}
        metrics = metrics_of(ranked[index].tolist(), relevant)
        results[row.pair].append(metrics)
        results["all"].append(metrics)
    return {pair: average(found) for pair, found in sorted(results.items())}


def table(results: Mapping[str, Metrics], names: Sequence[str]) -> str:
    """Metrics as a Markdown table, one line per key."""
    lines = ["| | n | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for key, metrics in results.items():
        cells = " | ".join(f"{metrics[name]:.3f}" for name in names)
        lines.append(f"| {key} | {metrics['n']:.0f} | {cells} |")
    return "\n".join(lines)


def show(results: Mapping[str, Metrics], *, as_json: bool) -> None:
    """Print metrics as JSON or as a table."""
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print(table(results, ["hit@1", "hit@5", "hit@10", "recall@10", "mrr@10", "ndcg@10"]))


def run(options: EvaluateConfig) -> None:
    """Command: evaluate on rows."""
    embedder = load_embedder(options.model, family=options.family)
    rows, store = read_rows(options.rows), store_of(options.rows)
    results: dict[str, Metrics] = {}
    for dim in options.dims or [embedder.dim]:
        for pair, metrics in evaluate_rows(embedder, rows, store, dim).items():
            results[f"{pair} ({dim})"] = metrics
    show(results, as_json=options.as_json)
