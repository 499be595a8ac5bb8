"""Several experts over one base: each query is embedded by the expert whose queries are nearest.

Documents are always embedded by the base, so that all vectors of a collection are of one model and
can be compared; an expert has to be trained against them. A query is embedded by the base first,
and its expert is the one whose centroid has the highest cosine: the mean of the base's vectors of
its training queries (RouterRetriever, arXiv 2409.02685, with one centroid for each expert).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content, ContentLike
from mmrag.embedders.base import (
    Embedder,
    as_items,
    check_dim,
    optional_traits,
    truncate_normalise,
)
from mmrag.errors import ConfigError, ModelError

ROUTE = "route.json"
"""File in an expert's folder: the centroid of its queries, and a probe of the base."""

Vectors = NDArray[np.float32]
# A text whose vector tells whether a centroid is of this base, whatever its dtype.
_PROBE = Content("Which expert should answer a question about pensions, pumps or proteins?")
_LEAST_COSINE = 0.99  # int8 on a CPU is at 0.997 of float32


@dataclass(frozen=True)
class Expert:
    """An embedder for some of the queries, and where these lie in the base's space.

    centroid: (dim,) float32, of L2 norm 1.

    >>> from mmrag import load_embedder
    >>> nano = load_embedder("mmrag-nano", device="cpu")
    >>> Expert(nano, nano.encode(["questions of law"])[0]).centroid.shape
    (384,)
    """

    embedder: Embedder
    centroid: Vectors


class RoutedEmbedder:
    """An Embedder that embeds documents by the base, and each query by one of its experts.

    What has no instruction is a document; see ``Embedder.encode``.

    Raises:
        ConfigError: Without an expert, or for one whose vectors cannot be compared with the base's.

    >>> from mmrag import load_embedder
    >>> base = load_embedder("mmrag-nano", device="cpu")
    >>> far, near = base.encode(["law and courts", "disease and treatment"])
    >>> model = RoutedEmbedder(base, {"law": Expert(base, far), "health": Expert(base, near)})
    >>> model.route(["How is measles treated?"])
    ['health']
    """

    def __init__(self, base: Embedder, experts: Mapping[str, Expert]) -> None:
        if not experts:
            raise ConfigError("experts: give at least one.")
        for name, expert in experts.items():
            if expert.embedder.dim != base.dim:
                raise ConfigError(
                    f"expert {name!r} gives {expert.embedder.dim} dimensions, and the base "
                    f"{base.dim}: its queries cannot be compared with the base's documents."
                )
        self.base = base
        self.experts = dict(experts)
        self.name = base.name
        self.family = base.family
        self.dim = base.dim
        able = [expert.embedder.modalities for expert in experts.values()]
        self.modalities = base.modalities.intersection(*able)
        self.fingerprint = self._fingerprint()
        # What ingestion asks of an embedder is asked of documents, which are the base's.
        self.matryoshka_dims: tuple[int, ...] = ()
        vars(self).update(optional_traits(base))

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.base.fingerprint.encode())
        for name, expert in sorted(self.experts.items()):
            digest.update(f"\0{name}\0{expert.embedder.fingerprint}\0".encode())
            digest.update(expert.centroid.tobytes())
        return digest.hexdigest()[:16]

    def route(self, queries: Sequence[ContentLike], instruction: str | None = "") -> list[str]:
        """The name of the expert of each query.

        Raises:
            ContentError: For a query that cannot be used.
        """
        return self._nearest(self.base.encode(queries, instruction)) if queries else []

    def _nearest(self, vectors: Vectors) -> list[str]:
        names = list(self.experts)
        # (queries, experts)
        scores = vectors @ np.stack([self.experts[name].centroid for name in names]).T
        return [names[index] for index in scores.argmax(axis=1)]

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> Vectors:
        """Embed documents by the base and queries by their experts; see ``Embedder.encode``.

        Queries and documents may be mixed: each content's own instruction decides.
        """
        kept = check_dim(dim, self.dim, self.matryoshka_dims)
        items = as_items(self, contents, instruction)
        # By the base for all: of documents these are the vectors, and of queries what routes them.
        vectors = self.base.encode(items, progress=progress)
        asked = [index for index, item in enumerate(items) if item.instruction is not None]
        chosen: dict[str, list[int]] = {}
        for index, name in zip(asked, self._nearest(vectors[asked]), strict=True):
            chosen.setdefault(name, []).append(index)
        for name, indices in chosen.items():
            vectors[indices] = self.experts[name].embedder.encode([items[i] for i in indices])
        return truncate_normalise(vectors, kept)


def save_route(folder: str | Path, base: Embedder, queries: Vectors) -> Path:
    """Write the centroid of an expert's training queries into its folder.

    Args:
        base: the embedder that routes.
        queries: vectors of the training queries by ``base``, (n, dim), n above 0.

    Raises:
        ModelError: If the folder is not there, or the vectors cancel out.
    """
    path = Path(folder) / ROUTE
    if not path.parent.is_dir():
        raise ModelError(f"{folder}: there is no such folder; give that of the expert's weights.")
    mean = queries.astype(np.float64).mean(axis=0)
    if not np.linalg.norm(mean) > 1e-6:
        raise ModelError(f"{folder}: the vectors of its queries have no common direction.")
    centroid = mean / np.linalg.norm(mean)
    probe = base.encode([_PROBE])[0]
    about = {"n_queries": len(queries), "centroid": centroid.tolist(), "probe": probe.tolist()}
    path.write_text(json.dumps(about), encoding="utf-8")
    return path


def load_routed(
    name: str | Path,
    experts: Mapping[str, str | Path] | str | Path,
    *,
    revision: str | None = None,
    **options: Any,
) -> RoutedEmbedder:
    """Load a base and its experts.

    Weights that an expert shares with the base are held once.

    Args:
        name: the base, as for ``load_embedder``.
        experts: adapters or checkpoints by name, each with a ``route.json``; or a folder of them,
            whose names are those of its folders.
        revision: of the base.
        options: of ``load_embedder``, for all.

    Raises:
        ConfigError: If there is no expert, or it does not go with the base.
        ModelError: For an expert without a ``route.json``, or with one of another base.
    """
    from mmrag.embedders.registry import load_embedder
    from mmrag.modeling.checkpoints import find_checkpoint, is_adapter

    base = load_embedder(name, revision=revision, **options)
    probe = base.encode([_PROBE])[0]
    found: dict[str, Expert] = {}
    for label, place in find_experts(experts).items():
        folder = find_checkpoint(place)
        centroid = read_route(folder, probe)
        # An adapter states the path that its base had where it was trained.
        under: dict[str, Any] = (
            {"base": find_checkpoint(name, revision)} if is_adapter(folder) else {}
        )
        embedder = load_embedder(folder, **options, **under)
        share_weights(base, embedder)
        found[label] = Expert(embedder, centroid)
    return RoutedEmbedder(base, found)


def find_experts(experts: Mapping[str, str | Path] | str | Path) -> dict[str, str | Path]:
    """Experts by name: as given, or the folders with a ``route.json`` in a folder.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(experts, Mapping):
        return dict(experts)
    routes = sorted(Path(experts).glob(f"*/{ROUTE}"))
    if not routes:
        raise ConfigError(
            f"experts={str(experts)!r}: no folder in it has a {ROUTE}. The recipe route writes one "
            "into the folder of an adapter."
        )
    return {path.parent.name: path.parent for path in routes}


def read_route(folder: Path, probe: Vectors) -> Vectors:
    """The centroid of an expert, (dim,) float32 of L2 norm 1.

    probe: the base's vector of the probe.

    Raises:
        ModelError: If there is none, or it was computed with another base.
    """
    from mmrag.modeling.checkpoints import read_json

    about = read_json(folder / ROUTE)
    if not about:
        raise ModelError(f"{folder}: there is no {ROUTE}. The recipe route writes it.")
    try:
        centroid, stored = (np.array(about[key], dtype=np.float32) for key in ("centroid", "probe"))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / ROUTE} is damaged ({error!r}); write it again.") from error
    same = stored.shape == centroid.shape == probe.shape
    if not (same and float(stored @ probe) >= _LEAST_COSINE):
        raise ModelError(
            f"{folder / ROUTE} was written with another base model. Write it again with this one."
        )
    return centroid


def share_weights(base: Embedder, expert: Embedder) -> None:
    """Let an expert use the base's tensors where they are equal, as adapters leave most of them."""
    import torch

    ours, theirs = (
        getattr(getattr(one, "backbone", None), "model", None) for one in (base, expert)
    )
    if not (isinstance(ours, torch.nn.Module) and isinstance(theirs, torch.nn.Module)):
        return  # a model that runs elsewhere
    weights = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        if name in weights and torch.equal(weight, weights[name]):
            weight.data = weights[name].data
