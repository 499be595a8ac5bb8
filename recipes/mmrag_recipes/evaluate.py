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
    kept = check_dim(dim, embedder.dim)
    # In full, and cut below: one embedding serves every dimension of a ranking.
    documents = embedder.encode([store.content(item) for item in corpus_of(rows)])
    queries = encode_queries(embedder, rows, store)
    found = row_metrics(
        rows, truncate_normalise(queries, kept), truncate_normalise(documents, kept)
    )
    results: dict[str, list[Metrics]] = defaultdict(list)
    for row, metrics in zip(rows, found, strict=True):
        results[row.pair].append(metrics)
        results["all"].append(metrics)
    return {pair: average(found) for pair, found in sorted(results.items())}


def encode_queries(
    embedder: Embedder, rows: Sequence[Row], store: ImageStore
) -> NDArray[np.float32]:
    """Vectors of the queries of rows, each with its instruction: (len(rows), dim)."""
    asked: dict[str | None, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        # One call for each instruction, so that batches are full.
        asked[resolve(row.instruction)].append(index)
    queries = np.zeros((len(rows), embedder.dim), dtype=np.float32)
    for instruction, indices in asked.items():
        contents = [store.content(rows[index].query) for index in indices]
        queries[indices] = embedder.encode(contents, instruction)
    return queries


def row_metrics(
    rows: Sequence[Row], queries: NDArray[np.float32], documents: NDArray[np.float32]
) -> list[Metrics]:
    """Metrics of each row: its query ranks the corpus of all rows.

    Args:
        queries: (len(rows), d), normalised.
        documents: (len(corpus_of(rows)), d), normalised, in that order.
    """
    position = {item.key: index for index, item in enumerate(corpus_of(rows))}
    order = rank(queries, documents, CUTS[-1])
    return [
        metrics_of(ranked, {position[item.key]: 1.0 for item in row.positives})
        for row, ranked in zip(rows, order.tolist(), strict=True)
    ]


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
