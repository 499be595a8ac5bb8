"""One library asked all questions: what each of its rankings, and their fusions, return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any, TypedDict

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore

from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.kept import Kept, fingerprint
from mmrag.evaluation.matryoshka import cut_collection
from mmrag.evaluation.metrics import CUTS
from mmrag.evaluation.questions import Page, Question, as_page, page_id
from mmrag.evaluation.results import Scope, ScoredPage, System
from mmrag.index import UniversalIndex
from mmrag.queries import MultimodalQuery, Where, query_content
from mmrag.retrieval.fusion import DEFAULT_WEIGHTS, REFERENCE
from mmrag.retrieval.retriever import QUERY_TASKS, RetrieverOptions, UniversalRetriever
from mmrag.store.collection import Collection
from mmrag.store.engine import Scored

FUSIONS: Mapping[str, RetrieverOptions] = {
    "fusion": {},
    "fusion by ranks": {"fuse_by": "ranks"},
}
"""The ways to fuse that are compared: options of the retriever by name, the first as it ships."""

# A weight of 0 leaves a ranking out, and each is to be measured on its own.
_EVERY_RANKING = dict.fromkeys(DEFAULT_WEIGHTS, 1.0)
_RERANKED = 3  # pages given to each reranker for one that it hands on, as ``mmrag ask --rerank``


class AskOptions(TypedDict, total=False):
    """The options of ``evaluate``."""

    cuts: tuple[int, ...]
    scopes: tuple[Scope, ...]
    fusions: Mapping[str, RetrieverOptions]
    dims: tuple[int, ...]
    rerankers: Mapping[str, Sequence[BaseNodePostprocessor]]
    depth: int


@dataclass(frozen=True)
class Options:
    """``AskOptions`` with their defaults, checked."""

    cuts: tuple[int, ...] = CUTS
    scopes: tuple[Scope, ...] = ("corpus", "document")
    fusions: Mapping[str, RetrieverOptions] = field(default_factory=lambda: FUSIONS)
    dims: tuple[int, ...] = ()
    rerankers: Mapping[str, Sequence[BaseNodePostprocessor]] = field(default_factory=dict)
    depth: int = 100

    def __post_init__(self) -> None:
        if not self.cuts or min(self.cuts) < 1 or list(self.cuts) != sorted(set(self.cuts)):
            raise ConfigError(f"cuts={self.cuts}: give numbers of at least 1, ascending.")
        if self.rerankers and not self.fusions:
            raise ConfigError("A reranker needs a fusion to reorder.")


def ask_library(
    model: str,
    index: UniversalIndex,
    questions: Sequence[Question],
    options: Options,
    kept: Kept,
    notes: list[str],
    done: Callable[[int], None],
) -> Iterator[tuple[System, str, list[ScoredPage]]]:
    """Ask every question in every scope; yield what each system returned for each question.

    Questions that the embedder cannot take are in ``notes``, and nothing is found for them.
    ``done`` is called with the number of questions asked so far.

    Raises:
        MissingCollectionError: If there is nothing in the library.
        EndpointError: If a server fails, so that nothing else would come either.
    """
    retrievers = _Retrievers(index, options)
    base = _state(index, retrievers, options)
    # By content and not by number: questions may be added to a file between two parts of a run.
    keys = {
        (question.id, scope): fingerprint(base, scope, *question_state(question))
        for question in questions
        for scope in options.scopes
    }
    for count, question in enumerate(questions):
        done(count)
        todo = [scope for scope in options.scopes if keys[question.id, scope] not in kept]
        try:
            # Alone, as it is asked in use: in half precision a batch moves vectors, and so ranks.
            vector = _embedded(retrievers.own, question) if todo else None
        except ContentError as error:
            notes.append(f"question {question.id} could not be asked: {error}")
            continue
        for scope in todo:
            query = question.query(embedding=vector, where=_within(question, scope))
            kept[keys[question.id, scope]] = retrievers.ask(query)
    done(len(questions))
    for (id_, scope), key in keys.items():
        for row in kept.get(key, ()):
            system = System(model, row["ranking"], row["dim"], row["reranker"], scope)
            yield system, id_, [(as_page(page), score) for page, score in row["pages"]]


class _Retrievers:
    """The retrievers of a library: every ranking on its own and each fusion, by dimension."""

    def __init__(self, index: UniversalIndex, options: Options) -> None:
        self.options = options
        top = max(options.cuts)
        self.own = index.as_retriever(similarity_top_k=top, depth=options.depth)
        self.by_dim: dict[int | None, tuple[UniversalRetriever, dict[str, UniversalRetriever]]] = {}
        for dim in (None, *options.dims):
            collection = index.collection
            if dim is not None:
                collection = cut_collection(collection, index.embedder, dim)
            make: Callable[..., UniversalRetriever] = partial(
                UniversalRetriever, collection, index.embedder, late=index.late, depth=options.depth
            )
            usual: RetrieverOptions = {"similarity_top_k": top}
            fused = {name: make(**(usual | given)) for name, given in options.fusions.items()}
            wide = make(similarity_top_k=top, weights=_EVERY_RANKING)
            self.by_dim[dim] = (wide, fused)

    def ask(self, query: MultimodalQuery) -> list[dict[str, Any]]:
        """The pages of each system, as JSON values."""
        rows: list[dict[str, Any]] = []

        def add(ranking: str, dim: int | None, pages: Iterable[ScoredPage], by: str | None) -> None:
            # Rounded, so that the file of kept results stays small.
            best = [[page_id(page), round(score, 6)] for page, score in pages]
            rows.append({"ranking": ranking, "dim": dim, "reranker": by, "pages": best})

        for dim, (wide, fused) in self.by_dim.items():
            for name, hits in wide.rankings(query).items():
                # References are few, and words have no dimensions.
                if name != REFERENCE and (dim is None or name in wide.collection.settings.views):
                    add(name, dim, pages_of(hits), None)
            for name, retriever in fused.items():
                add(name, dim, pages_of_nodes(retriever.retrieve(query)), None)
        for label, chain in self.options.rerankers.items():
            # The fusion as it ships, with all dimensions: other fusions are for comparison.
            name, retriever = next(iter(self.by_dim[None][1].items()))
            query.top_k = retriever.similarity_top_k * _RERANKED ** len(chain)
            nodes = retriever.retrieve(query)
            for reranker in chain:
                nodes = reranker.postprocess_nodes(nodes, query_bundle=query)
            add(name, None, pages_of_nodes(nodes), label)
        return rows


def _state(index: UniversalIndex, retrievers: _Retrievers, options: Options) -> str:
    """A fingerprint of all that moves the results of a library, but for the question."""
    rerankers = {name: repr(chain) for name, chain in options.rerankers.items()}
    weights = retrievers.own.weights
    return fingerprint(
        collection_state(index.collection),
        weights,
        {name: dict(given) for name, given in options.fusions.items()},
        [max(options.cuts), options.depth, options.dims, rerankers],
    )


def collection_state(collection: Collection) -> list[Any]:
    """What is in a collection, how it was made, and the mmrag that asks it, as JSON values."""
    from mmrag import __version__

    files = sorted((entry.sha256, entry.file) for entry in collection.files())
    return [__version__, collection.settings.to_json(), files]


def question_state(question: Question) -> tuple[Any, ...]:
    """What of a question moves its results."""
    image = None
    if question.image is not None:
        with contextlib.suppress(OSError):  # embedding it says what is wrong
            image = fingerprint(question.image.read_bytes().hex())
    # The files, since the scope "document" filters by them; not the pages, which only judge.
    return question.text, image, sorted({file for file, _ in question.relevant})


def _embedded(retriever: UniversalRetriever, question: Question) -> list[float]:
    content = query_content(question.query())
    task = retriever.instruction or QUERY_TASKS[content.modality]
    dim = retriever.collection.settings.dim
    vector: list[float] = retriever.embedder.encode([content], task, dim)[0].tolist()
    return vector


def _within(question: Question, scope: Scope) -> Where | None:
    """The filter of a scope: the documents of the right pages, or none."""
    files = dict.fromkeys(file for file, _ in question.relevant)
    return Where(files=tuple(files)) if scope == "document" else None


def page_of(payload: Mapping[str, Any]) -> Page:
    """The page of a node by its payload or metadata; a file without pages is its page 1."""
    page = payload.get("page")
    return PurePath(payload.get("file", "")).name, 1 if page is None else int(page)


def pages_of(hits: Iterable[Scored]) -> list[ScoredPage]:
    """Pages in the order of their best nodes."""
    return _first((page_of(hit.payload), hit.score) for hit in hits)


def pages_of_nodes(nodes: Iterable[NodeWithScore]) -> list[ScoredPage]:
    """``pages_of`` for what a LlamaIndex retriever returns."""
    return _first((page_of(found.node.metadata), found.score or 0.0) for found in nodes)


def _first(pages: Iterable[ScoredPage]) -> list[ScoredPage]:
    best: dict[Page, float] = {}
    for page, score in pages:
        # The first node of a page is its best one.
        best.setdefault(page, score)
    return list(best.items())
