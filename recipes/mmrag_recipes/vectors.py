"""Vectors of many items: computed once and kept, and searched in blocks."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders.base import Embedder
from mmrag.instructions import resolve
from mmrag_recipes.console import track
from mmrag_recipes.rows import ImageStore, Item

logger = logging.getLogger("mmrag_recipes")

Vectors = NDArray[np.float32]

_ITEMS_AT_ONCE = 2048  # embedded between two savings
_SCORES_AT_ONCE = 32_000_000  # 128 MB of float32


class VectorCache:
    """Vectors of items by content and instruction, in a folder; None keeps nothing.

    Where the folder cannot be written, a warning says so, and nothing is kept.

    Only vectors of an embedder with the same fingerprint are taken from it.
    """

    def __init__(self, folder: Path | None, embedder: Embedder, store: ImageStore) -> None:
        self.embedder = embedder
        self.store = store
        name = hashlib.sha256(embedder.fingerprint.encode()).hexdigest()[:16]
        self.folder = folder / f"vectors-{name}" if folder else None

    def encode(
        self, items: Sequence[Item], instructions: Sequence[str | None] | None = None
    ) -> Vectors:
        """Vectors of items, (len(items), dim); ``instructions``: of queries, one for each item.

        What is missing is embedded some thousands at a time, and each lot is kept at once, so
        that a run that stops loses little.
        """
        tasks = [resolve(one) for one in instructions or [None] * len(items)]
        # 63 bits, which numpy holds as int64; a collision in a billion items is unlikely.
        names = [f"{item.key}/{task or ''}" for item, task in zip(items, tasks, strict=True)]
        digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
        keys = [int.from_bytes(digest, "big") >> 1 for digest in digests]
        known = self._load(set(keys))
        missing: dict[str | None, dict[int, Item]] = defaultdict(dict)
        for key, item, task in zip(keys, items, tasks, strict=True):
            if key not in known:
                missing[task][key] = item
        lots = [
            (task, list(wanted.items())[start : start + _ITEMS_AT_ONCE])
            for task, wanted in missing.items()
            for start in range(0, len(wanted), _ITEMS_AT_ONCE)
        ]
        for task, lot in track(lots, len(lots), f"embedding {sum(map(len, missing.values()))}"):
            vectors = self.embedder.encode([self.store.content(item) for _, item in lot], task)
            self._save([key for key, _ in lot], vectors)
            known.update(zip((key for key, _ in lot), vectors, strict=True))
        empty = np.zeros((0, self.embedder.dim), dtype=np.float32)
        return np.stack([known[key] for key in keys]) if keys else empty

    def _load(self, wanted: set[int]) -> dict[int, Vectors]:
        known: dict[int, Vectors] = {}
        for path in sorted(self.folder.glob("*.npz")) if self.folder else ():
            with np.load(path) as lot:
                pairs = zip(lot["keys"].tolist(), lot["vectors"], strict=True)
                known.update((key, vector) for key, vector in pairs if key in wanted)
        return known

    def _save(self, keys: Sequence[int], vectors: Vectors) -> None:
        if self.folder is None:
            return
        target = self.folder / f"{len(list(self.folder.glob('*.npz'))):06d}.npz"
        partial = target.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, keys=np.array(keys, dtype=np.int64), vectors=vectors)
            partial.replace(target)
        except OSError as error:
            # Rows may lie on a disk that is read-only: vectors are kept to save time alone.
            logger.warning("vectors are not kept: %s", error)
            self.folder = None


def nearest(
    queries: Vectors, documents: Vectors, depth: int
) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
    """For each query in turn, its nearest documents, best first, with their scores.

    Equal scores keep the order of the documents. Scores are computed in blocks of queries, so
    that memory stays the same for any number of either.
    """
    block = max(1, _SCORES_AT_ONCE // max(1, len(documents)))
    for start in range(0, len(queries), block):
        for scores in queries[start : start + block] @ documents.T:
            found = np.arange(len(scores))
            if depth < len(scores):
                least = np.partition(scores, -depth)[-depth]
                # With >=, so that equal scores at the border are all there for the stable sort.
                found = np.flatnonzero(scores >= least)
            order = found[np.argsort(-scores[found], kind="stable")][:depth]
            yield order, scores[order]
