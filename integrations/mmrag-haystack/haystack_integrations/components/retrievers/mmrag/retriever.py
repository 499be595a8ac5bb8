"""Pages, figures and passages of an mmrag collection as Documents."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret

from haystack_integrations.components.retrievers.mmrag.filters import as_metadata_filters
from mmrag.errors import ConfigError
from mmrag.index import DEFAULT_LOCATION, UniversalIndex
from mmrag.nodes import Hit, node_image


@component
class MMRAGRetriever:
    """Finds pages, figures and passages in a collection that ``mmrag index`` has made.

    It takes the question itself: besides vectors it ranks by words, and fuses the rankings, as
    ``UniversalRetriever`` does.

    Each Document has the text of the page or node, its ``score`` in [0, 1], and as metadata what it
    was indexed with: ``file``, ``page``, the ``label`` printed on it, ``kind``. Added are
    ``image_path`` of the figure or its page, ``ranks`` in each ranking, ``box`` (in PDF points) if
    a part of the page matched best, and ``description`` and ``described_by`` where a model has
    described it.

    Args:
        location: the collection's folder, or the URL of a Qdrant server.
        top_k: how many Documents come back.
        filters: Haystack's; ``meta.file`` takes names and globs too.
        embed_model: by default the model that built the collection.
        collection_name: its name on a server.
        api_key: of the server, for instance ``Secret.from_env_var("QDRANT_API_KEY")``.
        options: other options of ``UniversalRetriever``: weights, instruction, collapse, depth.
        index: a UniversalIndex that is open, in place of ``location``. Only one can have a folder
            open. A component with one cannot be stored.

    Raises:
        ConfigError: For a ``top_k`` below 1, and for ``index`` along with a location.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("well.txt").write_text("The well is nine metres deep.")
        >>> with UniversalIndex("library") as index:
        ...     _ = index.add("well.txt")
        >>> retriever = MMRAGRetriever("library", top_k=1)
        >>> retriever.run("How deep is the well?")["documents"][0].content
        'The well is nine metres deep.'
        >>> retriever.close()
    """

    def __init__(
        self,
        location: str | None = None,
        *,
        top_k: int = 10,
        filters: dict[str, Any] | None = None,
        embed_model: str | None = None,
        collection_name: str = "mmrag",
        api_key: Secret | None = None,
        options: dict[str, Any] | None = None,
        index: UniversalIndex | None = None,
    ) -> None:
        if top_k < 1:
            raise ConfigError("top_k must be at least 1.")
        if index is not None and (location or embed_model or api_key):
            raise ConfigError("With index= leave out location, embed_model and api_key.")
        self.location = location or DEFAULT_LOCATION
        self.top_k = top_k
        self.filters = filters
        self.embed_model = embed_model
        self.collection_name = collection_name
        self.api_key = api_key
        self.options = options or {}
        self.index = index
        self._opened: UniversalIndex | None = None
        # A folder is opened, and a model loaded, by one thread.
        self._lock = threading.Lock()

    def to_dict(self) -> dict[str, Any]:
        """The component as Haystack stores it; of a key only where it is read from.

        Raises:
            ConfigError: With ``index``.
        """
        if self.index is not None:
            raise ConfigError("MMRAGRetriever(index=...) cannot be stored; give its location.")
        return default_to_dict(
            self,
            location=self.location,
            top_k=self.top_k,
            filters=self.filters,
            embed_model=self.embed_model,
            collection_name=self.collection_name,
            api_key=self.api_key,
            options=self.options,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MMRAGRetriever:
        """The component that ``to_dict`` has stored."""
        loaded: MMRAGRetriever = default_from_dict(cls, data)
        return loaded

    def warm_up(self) -> None:
        """Open the collection and load its model, once; ``run`` does it as well.

        Raises:
            MissingCollectionError: If nothing is indexed there.
            CollectionError: If it is in use by another process.
        """
        with self._lock:
            opened = self._open()
            # The collection first: without one, a default model would be loaded in vain.
            _ = opened.collection, opened.embedder

    def close(self) -> None:
        """Release the folder or connection that it has opened; an ``index`` given stays open."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        image: str | None = None,
    ) -> dict[str, Any]:
        """Find what answers a question.

        Args:
            query: the question; ``""`` where the image alone is the question.
            filters: take the place of the component's own.
            top_k: takes the place of the component's own.
            image: the path of an image that is part of the question.

        Returns:
            ``documents``: best first.

        Raises:
            MissingCollectionError: If nothing is indexed there.
            FilterError: For filters of another form than Haystack's.
        """
        chosen = self.filters if filters is None else filters
        where = as_metadata_filters(chosen) if chosen else None
        with self._lock:
            wanted = self.top_k if top_k is None else top_k
            retriever = self._open().as_retriever(similarity_top_k=wanted, **self.options)
        hits = retriever.search(query, image, where=where)
        return {"documents": [as_document(hit) for hit in hits]}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        image: str | None = None,
    ) -> dict[str, Any]:
        """As ``run``, off the event loop."""
        return await asyncio.to_thread(self.run, query, filters, top_k, image)

    def _open(self) -> UniversalIndex:
        if self.index is not None:
            return self.index
        if self._opened is None:
            self._opened = UniversalIndex(
                self.location,
                self.embed_model,
                name=self.collection_name,
                api_key=self.api_key.resolve_value() if self.api_key else None,
            )
        return self._opened


def as_document(hit: Hit) -> Document:
    """What a retriever of mmrag found, as a Document; see ``MMRAGRetriever``."""
    image = node_image(hit.node) or hit.node.metadata.get("page_image")
    found = {
        "image_path": None if image is None else str(image),
        "ranks": hit.ranks,
        "box": None if hit.box is None else list(hit.box),  # JSON has no tuples
        "description": hit.description,
        "described_by": hit.described_by,
    }
    known = {key: value for key, value in found.items() if value is not None}
    return Document(
        id=hit.node.node_id,
        content=hit.text,
        meta={**hit.node.metadata, **known},
        score=hit.score,
    )
