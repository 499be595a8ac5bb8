"""Hits and answers as JSON, and an answer as a stream of events."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode, NodeWithScore

from mmrag.nodes import (
    as_hit,
    document_name,
    explained,
    given_metadata,
    node_image,
    node_text,
    page_name,
)
from mmrag.queries import MultimodalQuery
from mmrag.server.library import Library
from mmrag.server.links import page_image_url, view_url
from mmrag.server.sse import Event

if TYPE_CHECKING:
    from mmrag.answering.context import Source
    from mmrag.answering.response import CitedResponse

_LONGEST_TEXT = 4000  # characters of a hit that are sent


def hit_row(hit: NodeWithScore, collection: str, base: str) -> dict[str, Any]:
    """A hit of a search. boxes: where it is on the page, in points; empty: all of the page."""
    values = hit.node.metadata
    found = as_hit(hit)
    box = found.box or values.get("box")
    boxes = [list(box)] if box else []
    return {
        "score": round(hit.score or 0.0, 4),
        "ranks": dict(found.ranks),
        "text": node_text(hit.node)[:_LONGEST_TEXT],
        "description": found.description,
        "described_by": found.described_by,
        **explained(found),
        **_place(hit.node, boxes, collection, base),
    }


def source_row(source: Source, collection: str, base: str) -> dict[str, Any]:
    """A source of an answer. boxes: the lines of its quote, else the box of what was found."""
    boxes = [list(box) for box in source.boxes or ((source.box,) if source.box else ())]
    return {
        "n": source.n,
        "cited": source.cited,
        "quote": source.quote,
        "text": source.text[:_LONGEST_TEXT],
        **_place(source.node.node, boxes, collection, base),
    }


def answer_row(response: CitedResponse, collection: str, base: str) -> dict[str, Any]:
    """A whole answer."""
    return {
        "found": response.found,
        "answer": response.response,
        "notice": response.notice,
        "sources": [source_row(source, collection, base) for source in response.sources],
        "problems": response.problems,
        "notes": response.notes,
    }


def answer_events(
    library: Library, query: MultimodalQuery, history: Sequence[tuple[str, str]], base: str
) -> Generator[Event, None, None]:
    """The events of one answer: ``sources``, ``token``..., ``answer``."""
    question, stream = library.ask(query, history)
    rows = [source_row(source, library.name, base) for source in stream.sources]
    yield Event({"question": question, "sources": rows}, "sources")
    # The text streams before its claims are checked, so the last event repeats it, checked.
    for token in stream.response_gen:
        yield Event({"text": token}, "token")
    yield Event(answer_row(stream.get_response(), library.name, base), "answer")


def _place(node: BaseNode, boxes: list[list[float]], collection: str, base: str) -> dict[str, Any]:
    """Where something is, and the addresses that show it."""
    values = node.metadata
    file, page = document_name(node), values.get("page")
    file_id = values.get("sha256")
    image = view = None
    if file_id is not None:
        view = view_url(base, collection, file_id, page, boxes)
        # Text files have no pages and no images of them.
        # A slide has an image only if one stands on it.
        shown = values.get("page_image") or node_image(node)
        if page is not None and shown is not None:
            image = page_image_url(collection, file_id, page, boxes)
    return {
        "file": file,
        "name": Path(file).name,
        "file_id": file_id,
        "page": page,
        "label": values.get("label"),
        "page_name": page_name(values),
        "kind": values.get("kind", "text"),
        "metadata": given_metadata(values),
        "boxes": [[round(edge, 2) for edge in box] for box in boxes],
        "image": image,
        "view": view,
    }
