"""What smaller vectors cost: recall against exact search, memory and latency, on own vectors.

Each setting is built from the collection's stored vectors in a temporary folder, and searched as
a collection would be. The collection itself is only read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders.base import truncate_normalise
from mmrag.errors import ConfigError
from mmrag.store.collection import Collection
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import Filter, Nearest, Point, Quantization, Schema
from mmrag.store.settings import View

TOP_K = 10
"""Recall counts the ten nearest."""

_BYTES: dict[Quantization, float] = {"none": 4.0, "int8": 1.0, "binary": 1 / 8}
_BATCH_POINTS = 500


@dataclass(frozen=True)
class StorageSetting:
    """What one way of keeping vectors gives.

    recall: share of the ten nearest by all dimensions that were among the first ten found.
    bytes_per_vector: that a search holds in memory; whole vectors stay on disk.
    p50_ms, p99_ms: of a search for ten, without the embedding of the query.

    Examples:
        >>> setting = StorageSetting("text", 384, "int8", 0.998, 384.0, 0.4, 1.2)
        >>> setting.bytes_per_vector / (4 * setting.dim)
        0.25
    """

    view: str
    dim: int
    quantization: Quantization
    recall: float
    bytes_per_vector: float
    p50_ms: float
    p99_ms: float


def measure_storage(
    collection: Collection,
    view: View,
    *,
    queries: NDArray[np.float32] | None = None,
    dims: Sequence[int] = (),
    quantizations: Sequence[Quantization] = ("none", "int8", "binary"),
    n_queries: int = 200,
    progress: Callable[[str], None] | None = None,
) -> list[StorageSetting]:
    """Measure every quantization at every dimension on the vectors of a view.

    Args:
        queries: (n, dim) float32 of length 1. Default: ``n_queries`` stored vectors drawn at
            random, each searched among the others; questions of one's own say more.
        dims: leading dimensions; default: all of them.
        progress: called with what comes next.

    Raises:
        ConfigError: If the view has fewer than eleven vectors.
    """
    _, vectors = collection.vectors(view)
    if len(vectors) <= TOP_K:
        raise ConfigError(
            f"The view {view!r} has {len(vectors)} vectors; recall of the {TOP_K} nearest needs "
            "more. Index more files, or choose another view."
        )
    if queries is None:
        drawn = np.random.default_rng(0).permutation(len(vectors))[:n_queries]
        queries, itself = vectors[drawn], drawn
    else:
        itself = np.full(len(queries), -1)
    nearest = _exact(vectors, queries, itself)
    settings = []
    for dim in dims or (vectors.shape[1],):
        for quantization in quantizations:
            if progress is not None:
                progress(f"{view}: {dim} dimensions, {quantization}")
            settings.append(_measure(view, vectors, queries, itself, nearest, dim, quantization))
    return settings


def _exact(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], itself: NDArray[Any]
) -> list[set[int]]:
    """Rows of the nearest vectors of each query, a query's own row left out."""
    nearest = []
    # One query at a time: all scores together may not fit in memory.
    for query, own in zip(queries, itself, strict=True):
        scores = vectors @ query
        if own >= 0:
            scores[own] = -np.inf
        nearest.append(set(np.argpartition(-scores, TOP_K)[:TOP_K].tolist()))
    return nearest


def _measure(
    view: View,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    itself: NDArray[Any],
    nearest: Sequence[set[int]],
    dim: int,
    quantization: Quantization,
) -> StorageSetting:
    kept, asked = truncate_normalise(vectors, dim), truncate_normalise(queries, dim)
    seconds, n_found = [], 0
    with tempfile.TemporaryDirectory(prefix="mmrag-report-") as folder:
        schema = Schema({view: dim}, (), (), quantization=quantization)
        engine = EdgeEngine(Path(folder) / "shard", schema)
        try:
            for rows in _batches(len(kept)):
                engine.upsert([Point(str(UUID(int=row)), {}, {view: kept[row]}) for row in rows])
            engine.optimize(schema)
            for query, own, expected in zip(asked, itself, nearest, strict=True):
                started = time.perf_counter()
                # One more than is counted: a stored vector finds itself first.
                (hits,) = engine.rank([Nearest(view, query)], TOP_K + (own >= 0), Filter())
                seconds.append(time.perf_counter() - started)
                found = [row for row in (UUID(hit.id).int for hit in hits) if row != own]
                n_found += len(expected & set(found[:TOP_K]))
        finally:
            engine.close()
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    recall = n_found / (TOP_K * len(queries))
    size = dim * _BYTES[quantization]
    return StorageSetting(view, dim, quantization, recall, size, float(p50), float(p99))


def _batches(count: int) -> Iterable[range]:
    return (
        range(start, min(count, start + _BATCH_POINTS)) for start in range(0, count, _BATCH_POINTS)
    )


def plot_storage(settings: Sequence[StorageSetting], path: Path) -> None:
    """Draw recall by bytes per vector, a line for each view and quantization.

    path: its suffix is the format, such as ``.png`` or ``.svg``.

    Raises:
        ConfigError: Without matplotlib, and for a format that it does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed: pip install 'mmrag[eval]'.") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for view, quantization in dict.fromkeys((each.view, each.quantization) for each in settings):
        line = [each for each in settings if (each.view, each.quantization) == (view, quantization)]
        sizes, recalls = zip(*((each.bytes_per_vector, each.recall) for each in line), strict=True)
        axes.plot(sizes, recalls, marker="o", label=f"{view}, {quantization}")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of a vector in memory")
    axes.set_ylabel(f"recall of the {TOP_K} nearest")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
