"""What is asked: a query's text and image, and which nodes may answer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.schema import QueryBundle

from mmrag.content import Content, ImageSource
from mmrag.errors import ConfigError


@dataclass(frozen=True)
class Where:
    """Which nodes a search may return.

    files: paths as they were indexed, file names, or glob patterns; any one suffices.
    pages: first and last page, both included; None is no bound.
    kinds: ``page``, ``figure``, ``passage``, ``picture``, ``text``; any one suffices.
    metadata: key to a value, or to a list of values any one of which suffices.
    """

    files: tuple[str, ...] = ()
    pages: tuple[int | None, int | None] | None = None
    kinds: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class MultimodalQuery(QueryBundle):
    """A QueryBundle whose image may be anything that ``mmrag.content`` loads.

    image: takes the place of ``image_path``.
    where: takes the place of the retriever's own filter for this query.
    top_k: takes the place of the retriever's ``similarity_top_k`` for this query.
    """

    image: ImageSource | None = None
    where: Where | None = None
    top_k: int | None = None


def query_content(bundle: QueryBundle) -> Content:
    """Text and image of a query. Raises ConfigError if it has neither."""
    image = getattr(bundle, "image", None)
    image = bundle.image_path if image is None else image
    text = bundle.query_str if bundle.query_str.strip() else None
    if text is None and not image:
        raise ConfigError("The query is empty: give a text, an image, or both.")
    return Content(text, image or None)
