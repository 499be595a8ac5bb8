"""Fit a projection of an old model's vectors into a new model's space, and measure it.

    python -m mmrag_recipes project rows.jsonl --old mmrag-nano --new my-embedder --out map.npz

With ``--source`` and ``--target`` a collection is copied, its vectors mapped: it is then searched
with the new model, and nothing was embedded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder, truncate_normalise
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.metrics import Metrics
from mmrag.store.collection import Collection
from mmrag.store.settings import lasting_name
from mmrag_recipes.config_models import ProjectConfig
from mmrag_recipes.evaluate import encode_queries, row_metrics
from mmrag_recipes.rows import ImageStore, Row, corpus_of, read_rows, store_of
from mmrag_recipes.vectors import VectorCache, Vectors

SHOWN = ("hit@1", "recall@10", "ndcg@10")


@dataclass(frozen=True)
class Projection:
    """A map from old vectors to new ones.

    matrix: (old dim, new dim) float32.

    >>> turn = Projection(np.array([[0.0, 1.0], [-1.0, 0.0]], dtype=np.float32))
    >>> turn.apply(np.array([[2.0, 0.0]], dtype=np.float32))
    array([[0., 1.]], dtype=float32)
    """

    matrix: Vectors

    def apply(self, vectors: Vectors) -> Vectors:
        """Map vectors (n, old dim) to (n, new dim), each of L2 norm 1."""
        return truncate_normalise(vectors @ self.matrix, self.matrix.shape[1])


def fit(old: Vectors, new: Vectors, method: str = "orthogonal", ridge: float = 1e-3) -> Projection:
    """Fit a projection to the vectors of the same documents by both models, in closed form.

    Args:
        old: (n, old dim). new: (n, new dim).
        method: ``orthogonal``, the Procrustes problem (Schoenemann 1966): the matrix of orthonormal
            rows or columns that brings ``old`` nearest to ``new``; or ``linear``, least squares.
        ridge: of ``linear``, the penalty on the squared matrix, times n.

    Raises:
        ContentError: If there are fewer documents than dimensions: the map would be arbitrary in
            the rest.
    """
    if len(old) < old.shape[1]:
        raise ContentError(
            f"{len(old)} documents are too few to fit {old.shape[1]} dimensions; give more rows."
        )
    # In float64: the normal equations square the condition of the vectors.
    x, y = old.astype(np.float64), new.astype(np.float64)
    if method == "orthogonal":
        left, _, right = np.linalg.svd(x.T @ y, full_matrices=False)
        matrix = left @ right
    else:
        matrix = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    return Projection(matrix.astype(np.float32))


def cross_recall(
    rows: Sequence[Row], store: ImageStore, old: Embedder, new: Embedder, projection: Projection
) -> dict[str, list[Metrics]]:
    """Metrics of each row for queries and documents of either model.

    Queries of one model search documents of the other where both have the same dimension.
    """
    corpus = [store.content(item) for item in corpus_of(rows)]
    old_documents, new_documents = old.encode(corpus), new.encode(corpus)
    new_queries = encode_queries(new, rows, store)
    found = {
        "new -> new": row_metrics(rows, new_queries, new_documents),
        "old -> old": row_metrics(rows, encode_queries(old, rows, store), old_documents),
        "new -> projected old": row_metrics(rows, new_queries, projection.apply(old_documents)),
    }
    if old.dim == new.dim:
        found["new -> old"] = row_metrics(rows, new_queries, old_documents)
    return found


def table(rows: Sequence[Row], found: Mapping[str, Sequence[Metrics]]) -> str:
    """Means with 95 % intervals as a Markdown table, one line per key.

    Rows of one place are drawn together; a row that names none stands alone.
    """
    owners = [row.place or row.id for row in rows]
    lines = ["| queries -> documents | n | " + " | ".join(SHOWN) + " |"]
    lines.append("|---" * (len(SHOWN) + 2) + "|")
    for name, metrics in found.items():
        values = np.array([[each[key] for key in SHOWN] for each in metrics])
        low, high = interval(values, owners)
        cells = [
            f"{mean:.3f} [{a:.3f}, {b:.3f}]"
            for mean, a, b in zip(values.mean(axis=0), low, high, strict=True)
        ]
        lines.append(f"| {name} | {len(metrics)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def map_vectors(source: Path, target: Path, old: Embedder, projection: Projection) -> int:
    """Map the vectors of a .npy file, (n, old dim). Returns how many.

    Raises:
        ContentError: If the file holds no such array.
    """
    try:
        vectors: NDArray[np.float32] = np.load(source)
    except (OSError, ValueError) as error:
        raise ContentError(f"{source}: no array can be read ({error}).") from error
    if vectors.ndim != 2 or vectors.shape[1] != old.dim:
        raise ContentError(f"{source}: shape {vectors.shape}, not (n, {old.dim}).")
    # Through an open file: given a path, numpy would add .npy to other names.
    with target.open("wb") as file:
        np.save(file, projection.apply(vectors.astype(np.float32)))
    return len(vectors)


def map_collection(
    source: Path, target: Path, old: Embedder, new: Embedder, projection: Projection
) -> int:
    """Copy a collection with its vectors mapped, to be searched with ``new``. Returns the points.

    Raises:
        ConfigError: If the collection is not one of ``old`` in full width.
        CollectionError: If it cannot be opened, or something else is at the target.
    """
    with Collection.open(source) as collection:
        settings = collection.settings
        if (settings.fingerprint, settings.dim) != (old.fingerprint, old.dim):
            raise ConfigError(
                f"{source} was built with {settings.embedder!r} in {settings.dim} dimensions, not "
                f"with {old.name!r} in {old.dim}: its vectors are others than those fitted."
            )
        wanted = replace(
            settings,
            embedder=lasting_name(new.name),
            fingerprint=new.fingerprint,
            dim=new.dim,
        )
        with Collection.open(target, settings=wanted) as mapped:
            return collection.copy_to(mapped, change=projection.apply)


def run(options: ProjectConfig) -> None:
    """Command: fit, measure, and map."""
    rows, store = read_rows(options.rows), store_of(options.rows)
    old, new = load_embedder(options.old), load_embedder(options.new)
    items = corpus_of(rows)
    kept = options.rows.with_name(options.rows.name + ".index")
    before, after = (VectorCache(kept, model, store).encode(items) for model in (old, new))
    projection = fit(before, after, options.method, options.ridge)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as file:
        about = {"old": np.array(old.fingerprint), "new": np.array(new.fingerprint)}
        np.savez(file, allow_pickle=False, matrix=projection.matrix, **about)
    cosine = (projection.apply(before) * after).sum(axis=1).mean()
    print(f"fitted on {len(items)} documents, mean cosine {cosine:.3f}: {options.out}")
    if options.evaluate:
        held_out = read_rows(options.evaluate)
        found = cross_recall(held_out, store_of(options.evaluate), old, new, projection)
        print(table(held_out, found))
    if options.source and options.target:
        if options.source.suffix == ".npy":
            count = map_vectors(options.source, options.target, old, projection)
        else:
            count = map_collection(options.source, options.target, old, new, projection)
        print(f"mapped {count} of {options.source}: {options.target}")
