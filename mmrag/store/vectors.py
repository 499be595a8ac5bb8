"""Which vectors a collection takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrag.errors import ConfigError
from mmrag.store.engine import TOKENS, Nearest
from mmrag.store.settings import CollectionSettings


def checked_vectors(
    settings: CollectionSettings, node_id: str, vectors: Mapping[str, Any]
) -> dict[str, NDArray[np.float32]]:
    """The vectors of a node, by name, as arrays.

    Raises:
        ConfigError: For a name that the collection does not have, and what ``check_vector`` raises.
    """
    unknown = set(vectors) - set(settings.vectors)
    if unknown:
        raise ConfigError(f"Node {node_id}: the collection has no view {unknown}.")
    arrays = {str(name): np.asarray(each, np.float32) for name, each in vectors.items()}
    for name, vector in arrays.items():
        check_vector(settings, name, vector)
    return arrays


def nearest(
    settings: CollectionSettings, vectors: Mapping[str, NDArray[np.float32]]
) -> list[Nearest]:
    """What asks for the nodes nearest to these, each in the view that it is named by.

    Raises:
        ConfigError: For a view that cannot be searched, and what ``check_vector`` raises.
    """
    # Tokens have no index, and are compared by MaxSim only.
    searchable = [name for name in settings.vectors if name != TOKENS]
    for view, vector in vectors.items():
        if view not in searchable:
            raise ConfigError(
                f"This collection has no view {view!r}; it has {', '.join(searchable)}."
            )
        check_vector(settings, view, vector)
    return [Nearest(view, vector) for view, vector in vectors.items()]


def check_vector(settings: CollectionSettings, name: str, vector: NDArray[np.float32]) -> None:
    """Refuse what cannot be compared with the vectors ``name``: (dim,), for tokens (n, dim).

    Raises:
        ConfigError: For another shape, and for NaN or infinity.
    """
    dim = settings.vectors.get(name, 0)
    # Qdrant takes no multivector without a row.
    fits = vector.ndim == 2 and len(vector) if name == TOKENS else vector.ndim == 1
    if not fits or vector.shape[-1] != dim:
        late = settings.late
        made_by = late.embedder if late and name in late.vectors else settings.embedder
        raise ConfigError(
            f"A vector of shape {vector.shape} does not fit: this collection holds vectors "
            f"of {dim} dimensions, made by {made_by}."
        )
    # One NaN makes every comparison with it false, and a search over it useless.
    if not np.isfinite(vector).all():
        raise ConfigError("A vector holds NaN or infinity; check the embedder.")
