"""UniversalRetriever: ranks every view and BM25 on their own, and fuses the rankings by page.

Raw scores of different views cannot be compared: text beside text is always nearer than text
beside an image, whatever it says. So each view is searched alone, its scores are scaled to
[0, 1], the nodes of one page count as that page with the best of them, and the rankings are added
up with weights.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, TypedDict

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters
from numpy.typing import NDArray

from mmrag.content import Content, ImageSource, Modality
from mmrag.embedders.base import Embedder, calibration_of
from mmrag.embedders.late import LateInteraction
from mmrag.embedding import embedding_events
from mmrag.errors import ConfigError
from mmrag.nodes import Credit, Evidence, Hit, as_hit
from mmrag.queries import MultimodalQuery, Where, query_content
from mmrag.retrieval.fusion import (
    BM25,
    DEFAULT_WEIGHTS,
    PAGE_FIELDS,
    REFERENCE,
    ZEROS,
    FuseBy,
    Fused,
    Rankings,
    fuse,
    page_key,
)
from mmrag.retrieval.late import late_rankings
from mmrag.retrieval.references import named_nodes, only_figures, wants_figures
from mmrag.store.collection import Collection
from mmrag.store.engine import TOKENS, Scored
from mmrag.store.filters import as_where

log = logging.getLogger(__name__)

QUERY_TASKS: Mapping[Modality, str] = {
    "text": "page_for_question",
    "image": "page_for_image",
    "fused": "page_for_image_question",
}
"""Task of a query by what it is made of."""


class RetrieverOptions(TypedDict, total=False):
    """The options of ``UniversalRetriever``, as ``UniversalIndex.as_retriever`` takes them."""

    similarity_top_k: int
    where: Where | MetadataFilters | None
    filters: MetadataFilters | None
    weights: Mapping[str, float] | None
    instruction: str | None
    collapse: bool
    depth: int
    fuse_by: FuseBy
    explain: bool
    callback_manager: CallbackManager | None


class UniversalRetriever(BaseRetriever):
    """Finds pages for a text, an image, or both, in one collection.

    Args:
        similarity_top_k: how many pages come back.
        where: a ``Where``, or LlamaIndex ``MetadataFilters``.
        filters: LlamaIndex ``MetadataFilters``, which must hold as well; see
            ``mmrag.store.filters.translated`` for what each operator means.
        weights: weight of each ranking; 0 leaves it out. Default: those that ``mmrag tune`` saved
            with the collection, else those of the embedder's calibration, else
            ``DEFAULT_WEIGHTS``.
        instruction: the task that the query carries: a name in
            ``mmrag.instructions`` or free text. By default it fits the query: see
            ``QUERY_TASKS``.
        collapse: one result per page. Otherwise every node stands for itself.
        depth: how many nodes of each ranking take part; at least four for each page wanted.
        fuse_by: ``"scores"`` or ``"ranks"``; see ``mmrag.retrieval.fusion.fuse``.
        explain: say of each hit what each ranking contributed.
        late: what made the collection's tokens; without it they are not compared.

    Each result is a ``Hit`` with ``ranks`` (rank in each ranking), ``view_scores`` (cosine or
    BM25 score in each), the ``box`` that matched and all nodes of the page that were found as
    ``evidence``; its node is as it was stored.

    Raises:
        ConfigError: For unknown or useless weights, filters that cannot be expressed, and queries
            that the embedder cannot embed.

    Examples:
        >>> from pathlib import Path
        >>> from mmrag import UniversalIndex
        >>> _ = Path("well.txt").write_text("The well is nine metres deep.")
        >>> with UniversalIndex("library") as index:
        ...     _ = index.add("well.txt")
        ...     retriever = UniversalRetriever(index.collection, index.embedder, similarity_top_k=1)
        ...     hit = retriever.retrieve("How deep is the well?")[0]
        >>> sorted(hit.ranks.items())
        [('bm25', 1), ('text', 1)]
    """

    def __init__(
        self,
        collection: Collection,
        embedder: Embedder,
        similarity_top_k: int = 8,
        where: Where | MetadataFilters | None = None,
        weights: Mapping[str, float] | None = None,
        instruction: str | None = None,
        collapse: bool = True,
        depth: int = 100,
        fuse_by: FuseBy = "scores",
        explain: bool = False,
        callback_manager: CallbackManager | None = None,
        filters: MetadataFilters | None = None,
        late: LateInteraction | None = None,
    ) -> None:
        if similarity_top_k < 1 or depth < 1:
            raise ConfigError("similarity_top_k and depth must be at least 1.")
        self.collection = collection
        self.embedder = embedder
        self.similarity_top_k = similarity_top_k
        self.where = as_where(where, filters)
        self.weights = _weights(weights, collection, embedder)
        # Not of a collection: what a cosine says is a property of the model.
        self.zeros = {**ZEROS, **calibration_of(embedder).zero_cosine}
        self.instruction = instruction
        self.collapse = collapse
        self.depth = depth
        self.fuse_by = fuse_by
        self.explain = explain
        # Without tokens in the collection there is nothing to compare.
        self.late = late if collection.settings.late else None
        super().__init__(callback_manager=callback_manager)

    def search(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        where: Where | MetadataFilters | None = None,
        top_k: int | None = None,
    ) -> list[Hit]:
        """``retrieve`` for a text, an image of any kind, or both."""
        return [as_hit(found) for found in self.retrieve(_query(text, image, where, top_k))]

    async def asearch(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        where: Where | MetadataFilters | None = None,
        top_k: int | None = None,
    ) -> list[Hit]:
        """``search`` that leaves the event loop free."""
        return [as_hit(found) for found in await self.aretrieve(_query(text, image, where, top_k))]

    def rankings(
        self, query: str | QueryBundle, *, limit: int | None = None
    ) -> dict[str, list[Scored]]:
        """Every ranking of nodes before fusion, best first, by its name.

        One embedding and one search per view: ``fuse`` can then be tried with any weights.
        ``reference`` is there if the question names a page, figure, table or section. Of a
        payload there is what fusion needs, ``PAGE_FIELDS``; ``Collection.payloads`` reads the rest.
        """
        bundle = QueryBundle(query) if isinstance(query, str) else query
        content = self._content(bundle)
        limit = limit or self.depth
        where = self._where(bundle)
        views: list[str] = [v for v in self.collection.settings.views if self.weights[v] > 0]
        # Embedded once for all views: they lie in one space.
        vectors = dict.fromkeys(views, self._vector(bundle, content)) if views else {}
        text = content.text if self.weights[BM25] > 0 else None
        found, by_words = self.collection.search_all(vectors, text, limit, where, PAGE_FIELDS)
        if text:
            found[BM25] = by_words
        if content.text and self.weights[REFERENCE] > 0:
            named = named_nodes(self.collection, content.text, where)
            # An empty ranking would take its weight from the others.
            found |= {REFERENCE: named} if named else {}
        found |= late_rankings(
            self.collection,
            self.late,
            content.text,
            found,
            limit=limit,
            where=where,
            weights=self.weights,
        )
        return {name: _in_order(hits) for name, hits in found.items()}

    @property
    def ranking_names(self) -> list[str]:
        """The rankings that any question may have, whatever their weights."""
        settings = self.collection.settings
        return [*(settings.vectors if self.late else settings.views), BM25]

    def _where(self, bundle: QueryBundle) -> Where | None:
        where = bundle.where if isinstance(bundle, MultimodalQuery) else None
        return where or self.where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        # A query may say for itself how many it wants.
        of_query = query_bundle.top_k if isinstance(query_bundle, MultimodalQuery) else None
        top_k = of_query or self.similarity_top_k
        # Several nodes of a ranking may be of one page.
        limit = max(self.depth, 4 * top_k)
        # A misspelt file name would otherwise look like "nothing found".
        for pattern in self.collection.unmatched(self._where(query_bundle)):
            log.warning("No indexed file matches %s", pattern)
        rankings = self.rankings(query_bundle, limit=limit)
        entries = self._fuse(rankings, top_k)
        figures = only_figures(self._where(query_bundle))
        if figures is not None and wants_figures(query_bundle.query_str):
            # What was asked for comes first, and pages after it.
            wanted = dataclasses.replace(_as_query(query_bundle), where=figures)
            rankings = self.rankings(wanted, limit=limit)
            first = self._fuse(rankings, top_k)
            keys = {entry.key for entry in first}
            entries = [*first, *(each for each in entries if each.key not in keys)][:top_k]
        # Rankings know a few fields of each node: the whole ones are read of what is returned.
        read = [hit.id for each in entries for hit in (each.shown, each.description) if hit]
        payloads = self.collection.payloads(read)
        return [self._result(entry, payloads) for entry in entries if entry.shown.id in payloads]

    def _fuse(self, rankings: Rankings, limit: int) -> list[Fused]:
        key = page_key if self.collapse else attrgetter("id")
        weights, zeros = self.weights, self.zeros
        return fuse(rankings, weights, by=self.fuse_by, zeros=zeros, key=key, limit=limit)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        # LlamaIndex's default would block the event loop.
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _content(self, bundle: QueryBundle) -> Content:
        content = query_content(bundle)
        if content.modality not in self.embedder.modalities:
            known = ", ".join(sorted(self.embedder.modalities))
            raise ConfigError(
                f"The embedder {self.embedder.name} cannot embed a query of kind "
                f"{content.modality!r}; it knows: {known}. Ask with one of these, or index with "
                "an embedder that reads images."
            )
        return content

    def _vector(self, bundle: QueryBundle, content: Content) -> NDArray[np.float32]:
        """The query's vector; several ``custom_embedding_strs`` (as of HyDE) are averaged."""
        # Set by LlamaIndex's engines that embed queries themselves.
        if bundle.embedding is not None:
            return np.asarray(bundle.embedding, dtype=np.float32)
        texts: Iterable[str | None] = bundle.custom_embedding_strs or [content.text]
        contents = [Content(text=text, image=content.image) for text in texts]
        dim = self.collection.settings.dim
        # Models were trained with an instruction for each task: the wrong one costs accuracy.
        task = self.instruction or QUERY_TASKS[content.modality]
        with embedding_events(self.embedder, contents, self.callback_manager) as done:
            vectors = self.embedder.encode(contents, instruction=task, dim=dim)
            done(vectors.tolist())
        mean = vectors.mean(axis=0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)

    def _result(self, entry: Fused, payloads: Mapping[str, Mapping[str, Any]]) -> Hit:
        described = payloads.get(entry.description.id, {}) if entry.description else {}
        return Hit(
            node=self.collection.node(payloads[entry.shown.id]),
            score=entry.score,
            retrieval_score=entry.score,
            ranks=entry.ranks,
            view_scores=entry.scores,
            box=entry.best.payload.get("box"),
            description=described.get("text"),
            described_by=described.get("described_by"),
            evidence=[
                Evidence(
                    # Inserted nodes have points with ids of their own; Qdrant takes none but UUIDs
                    # and numbers.
                    node_id=hit.payload.get("node_id", hit.id),
                    kind=hit.payload["kind"],
                    box=hit.payload.get("box"),
                )
                for hit in entry.nodes
            ],
            explanation=_explained(entry) if self.explain else None,
        )


def _in_order(hits: Iterable[Scored]) -> list[Scored]:
    """Best first, those of one score by id."""
    # Two sorts by a field each take a fraction of one sort by pairs.
    return sorted(sorted(hits, key=attrgetter("id")), key=attrgetter("score"), reverse=True)


def _explained(entry: Fused) -> dict[str, Credit]:
    return {
        name: Credit(rank=rank, score=entry.scores[name], credit=entry.credits[name])
        for name, rank in entry.ranks.items()
    }


def _as_query(bundle: QueryBundle) -> MultimodalQuery:
    """The query as one that has a filter of its own."""
    if isinstance(bundle, MultimodalQuery):
        return bundle
    return MultimodalQuery(
        **{each.name: getattr(bundle, each.name) for each in dataclasses.fields(bundle)}
    )


def _query(
    text: str | None,
    image: ImageSource | None,
    where: Where | MetadataFilters | None,
    top_k: int | None,
) -> MultimodalQuery:
    return MultimodalQuery(query_str=text or "", image=image, where=as_where(where), top_k=top_k)


def _weights(
    given: Mapping[str, float] | None, collection: Collection, embedder: Embedder
) -> dict[str, float]:
    """The weights in force; those given come first. Raises ConfigError."""
    check_weights(given or {})
    measured = calibration_of(embedder).fusion_weights
    # From the general to the particular: the later one wins.
    weights = {**DEFAULT_WEIGHTS, **measured, **collection.weights, **(given or {})}
    # Tokens only reorder what other rankings have found.
    first_stages = {*collection.settings.vectors, BM25} - {TOKENS}
    if not any(weights[name] for name in first_stages):
        raise ConfigError("All weights are 0: no ranking is left to search.")
    return weights


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError for rankings that do not exist and weights below 0."""
    unknown = sorted(set(weights) - set(DEFAULT_WEIGHTS))
    if unknown:
        raise ConfigError(f"Unknown rankings {unknown}; there are {sorted(DEFAULT_WEIGHTS)}.")
    if any(weight < 0 for weight in weights.values()):
        raise ConfigError("A weight cannot be negative; 0 leaves a ranking out.")
