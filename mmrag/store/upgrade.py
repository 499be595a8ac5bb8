"""Bring the points of a collection that an older mmrag wrote to the present schema."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from mmrag.reading.files import node_id
from mmrag.store.engine import AnyOf, Engine, Filter, Point
from mmrag.store.terms import DocumentTerms, NodeTerms, has_terms

# In the order that a page's nodes are read.
_KINDS = ("page", "passage", "figure", "picture", "text", "description")
_BATCH_POINTS = 64


def rebuild_terms(engine: Engine, language: str) -> int:
    """Make the terms of every node from its stored text, keeping its vectors.

    language: see ``CollectionSettings``.

    Returns:
        How many nodes there were. Cut short, it can simply be run again.
    """
    n_nodes = 0
    for sha256 in engine.facet("sha256"):
        nodes = Filter((AnyOf("sha256", (sha256,)),), (AnyOf("kind", ("file", "settings")),))
        terms = _terms_of(list(engine.scroll(nodes)), language)
        batch: list[Point] = []
        for point in engine.scroll(nodes, vectors=True):
            of_node = terms[point.id].to_payload() if point.id in terms else {}
            batch.append(dataclasses.replace(point, payload=point.payload | of_node))
            if len(batch) == _BATCH_POINTS:
                engine.upsert(batch)
                batch = []
        engine.upsert(batch)
        n_nodes += len(terms)
    return n_nodes


def _terms_of(points: Sequence[Point], language: str) -> dict[str, NodeTerms]:
    """Terms by node id, made page by page as indexing makes them."""
    pages: dict[int | None, list[Point]] = defaultdict(list)
    for point in points:
        pages[point.payload.get("page")].append(point)
    document = DocumentTerms(points[0].payload["file"], language)
    terms: dict[str, NodeTerms] = {}
    for page in sorted(pages, key=lambda number: number or 0):
        on_page = _in_reading_order(pages[page])
        texts = {point.id: point.payload.get("text", "") for point in on_page}
        for text in texts.values():
            document.read(text)
        for point in on_page:
            if has_terms(point.payload):
                terms[point.id] = document.of(texts[point.id])
    return terms


def _in_reading_order(points: Sequence[Point]) -> list[Point]:
    """The nodes of one page by kind, and by the number that their ids are made of."""
    order: list[str] = []
    for kind in _KINDS:
        same = [point.payload for point in points if point.payload["kind"] == kind]
        order += [
            node_id(payload["sha256"], payload.get("page"), kind, index)
            for index, payload in enumerate(same)
        ]
    places = {id_: place for place, id_ in enumerate(order)}
    return sorted(points, key=lambda point: places.get(point.id, len(order)))
