"""Hits and answers as JSON, and an answer as a stream of events."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import NodeWithScore

from mmrag.nodes import node_text
from mmrag.queries import MultimodalQuery
from mmrag.server.errors import problem_of
from mmrag.server.library import Library
from mmrag.server.links import page_image_url, view_url

if TYPE_CHECKING:
    from mmrag.answering.context import Source
    from mmrag.answering.response import CitedResponse

log = logging.getLogger(__name__)

_LONGEST_TEXT = 4000  # characters of a hit that are sent


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    name: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        """In the format of text/event-stream."""
        data = json.dumps(self.data, ensure_ascii=False)
        return f"event: {self.name}\ndata: {data}\n\n".encode()


def hit_row(hit: NodeWithScore, collection: str, base: str) -> dict[str, Any]:
    """A hit of a search. boxes: where it is on the page, in points; empty: all of the page."""
    values = hit.node.metadata
    box = values.get("box")
    boxes = [list(box)] if box else []
    return {
        "score": round(hit.score or 0.0, 4),
        "ranks": values.get("ranks", {}),
        "text": node_text(hit.node)[:_LONGEST_TEXT],
        **_place(values, boxes, collection, base),
    }


def source_row(source: Source, collection: str, base: str) -> dict[str, Any]:
    """A source of an answer. boxes: the lines of its quote, else the box of what was found."""
    values = source.node.node.metadata
    boxes = [list(box) for box in source.boxes or ((source.box,) if source.box else ())]
    return {
        "n": source.n,
        "cited": source.cited,
        "quote": source.quote,
        "text": source.text[:_LONGEST_TEXT],
        **_place(values, boxes, collection, base),
    }


def answer_row(response: CitedResponse, collection: str, base: str) -> dict[str, Any]:
    """A whole answer."""
    return {
        "found": response.found,
        "answer": response.response,
        "sources": [source_row(source, collection, base) for source in response.sources],
        "problems": response.problems,
        "notes": response.notes,
    }


def answer_events(
    library: Library, query: MultimodalQuery, history: Sequence[tuple[str, str]], base: str
) -> Generator[Event, None, None]:
    """The events of one answer: ``sources``, ``token``..., ``answer``; or ``error`` as the last.

    An error after the first event can no longer be an HTTP status.
    """
    started = False
    try:
        question, stream = library.ask(query, history)
        rows = [source_row(source, library.name, base) for source in stream.sources]
        yield Event("sources", {"question": question, "sources": rows})
        started = True
        for token in stream.response_gen:
            yield Event("token", {"text": token})
        yield Event("answer", answer_row(stream.get_response(), library.name, base))
    except Exception as error:
        if not started:
            raise
        problem = problem_of(error)
        if problem.status == 500:
            log.exception("Answering failed")
        yield Event("error", problem.body)


def _place(
    values: dict[str, Any], boxes: list[list[float]], collection: str, base: str
) -> dict[str, Any]:
    """Where something is, and the addresses that show it."""
    file, page = str(values.get("file", "")), values.get("page")
    file_id = values.get("sha256")
    image = view = None
    if file_id is not None:
        view = view_url(base, collection, file_id, page, boxes)
        if page is not None:
            image = page_image_url(collection, file_id, page, boxes)
    return {
        "file": file,
        "name": Path(file).name,
        "file_id": file_id,
        "page": page,
        "label": values.get("label"),
        "kind": values.get("kind", "text"),
        "boxes": [[round(edge, 2) for edge in box] for box in boxes],
        "image": image,
        "view": view,
    }
