"""What is asked: a query's text and image, and which nodes may answer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.schema import QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from mmrag.content import Content, ImageSource
from mmrag.errors import ConfigError


@dataclass(frozen=True)
class Where:
    """Which nodes a search may return.

    files: paths as they were indexed, file names, or glob patterns; any one suffices.
    pages: first and last page, both included; None is no bound.
    kinds: ``page``, ``figure``, ``passage``, ``picture``, ``text``; any one suffices.
    metadata: key to a value, or to a list of values any one of which suffices.
    filters: LlamaIndex's, with AND, OR, NOT and its operators; see ``mmrag.store.filters``.

    What is given must hold all together.

    Examples:
        >>> Where(files=("reports/*.pdf",), pages=(1, 20), kinds=("page",)).pages
        (1, 20)
    """

    files: tuple[str, ...] = ()
    pages: tuple[int | None, int | None] | None = None
    kinds: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    filters: MetadataFilters | None = None


@dataclass
class MultimodalQuery(QueryBundle):
    """A QueryBundle whose image may be anything that ``mmrag.content`` loads.

    image: takes the place of ``image_path``.
    where: takes the place of the retriever's own filter for this query.
    top_k: takes the place of the retriever's ``similarity_top_k`` for this query.

    Examples:
        >>> query = MultimodalQuery("where is this sold?", image="photo.jpg", top_k=3)
        >>> query.where = Where(files=("catalogue.pdf",))
    """

    image: ImageSource | None = None
    where: Where | None = None
    top_k: int | None = None


def query_content(query: str | QueryBundle) -> Content:
    """Text and image of a query, the one reader of both.

    Raises:
        ConfigError: If it has neither.

    >>> query_content(QueryBundle("", image_path="page.png"))
    Content(text=None, image='page.png', instruction=None, clip=None)
    """
    if isinstance(query, str):
        return Content(query)
    image = getattr(query, "image", None)
    image = query.image_path if image is None else image
    if isinstance(image, str) and not image:  # never by truth: an array has none
        image = None
    # LlamaIndex's bundle has a text always; a blank one stands for an image alone.
    text = query.query_str if query.query_str.strip() else None
    if text is None and image is None:
        raise ConfigError("The query is empty: give a text, an image, or both.")
    return Content(text, image)
