"""A collection as if its vectors had been stored with fewer dimensions (arXiv 2205.13147)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders.base import Embedder, check_dim, truncate_normalise
from mmrag.queries import Where
from mmrag.store.collection import Collection
from mmrag.store.engine import Fields, Scored


def cut_collection(collection: Collection, embedder: Embedder, dim: int) -> Collection:
    """The collection, each search over the leading ``dim`` dimensions, normalised again.

    Vectors are read once and searched exactly, in memory.

    Raises:
        ConfigError: For a dimension that is not stored, or that the embedder was not trained for.
    """
    check_dim(dim, collection.settings.dim, getattr(embedder, "matryoshka_dims", ()))
    # Everything but the search is the collection's own; see ``__getattr__``.
    return cast(Collection, _Cut(collection, dim))


class _Cut:
    def __init__(self, collection: Collection, dim: int) -> None:
        self._collection = collection
        self._dim = dim
        self._views: dict[str, tuple[list[Scored], NDArray[np.float32]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)

    def search_all(
        self,
        vectors: Mapping[str, NDArray[np.float32]],
        text: str | None,
        limit: int,
        where: Where | None = None,
        payload: Fields = True,
    ) -> tuple[dict[str, list[Scored]], list[Scored]]:
        _, by_words = self._collection.search_all({}, text, limit, where, payload)
        found = {
            view: self.search(view, vector, limit, where, payload)
            for view, vector in vectors.items()
        }
        return found, by_words

    def search(
        self,
        view: str,
        vector: NDArray[np.float32],
        limit: int,
        where: Where | None = None,
        payload: Fields = True,
    ) -> list[Scored]:
        if view not in self._collection.settings.views:  # of late interaction, not Matryoshka
            return self._collection.search(view, vector, limit, where, payload)
        if view not in self._views:
            nodes, vectors = self._collection.vectors(view)
            self._views[view] = nodes, truncate_normalise(vectors, self._dim)
        nodes, vectors = self._views[view]
        scores = vectors @ truncate_normalise(vector[None], self._dim)[0]
        allowed = list(range(len(nodes)))
        if where is not None:
            # The store filters, so that a filter means the same with any number of dimensions.
            within = {hit.id for hit in self._collection.find(where, self._collection.count())}
            allowed = [index for index in allowed if nodes[index].id in within]
        # By id where scores are equal, as the store orders them.
        best = sorted(allowed, key=lambda index: (-scores[index], nodes[index].id))[:limit]
        return [Scored(nodes[i].id, float(scores[i]), nodes[i].payload) for i in best]
