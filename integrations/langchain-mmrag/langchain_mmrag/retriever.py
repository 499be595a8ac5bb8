"""An mmrag collection as LangChain's retriever."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from llama_index.core.vector_stores.types import MetadataFilters
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from mmrag.content import ImageSource
from mmrag.errors import ConfigError
from mmrag.index import DEFAULT_LOCATION, UniversalIndex
from mmrag.nodes import Hit, node_image
from mmrag.queries import Where

Filters = Mapping[str, Any] | Where | MetadataFilters


class MMRAGRetriever(BaseRetriever):
    """Finds pages, figures and passages in a collection that ``mmrag index`` has made.

    It ranks by every view and by words, and fuses the rankings, as ``UniversalRetriever`` does.
    ``invoke`` takes ``k``, ``filters`` and ``image`` for one question as well: with a text of
    ``""`` the image alone is the question.

    Each Document has the text of the page or node, which is empty for a scan without words, and the
    metadata that it was indexed with: ``file``, ``page``, the ``label`` printed on it, ``kind``.
    Added are ``score`` in [0, 1], ``image_path`` of the figure or its page, ``ranks`` in each
    ranking, ``box`` (in PDF points) if a part of the page matched best, and ``description`` and
    ``described_by`` where a model has described it.

    Raises:
        ConfigError: For ``index`` along with what says how to open one, and, when asked, for
            filters and options that do not exist.
        MissingCollectionError: When asked, if nothing is indexed there.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("well.txt").write_text("The well is nine metres deep.")
        >>> with UniversalIndex("library") as index:
        ...     _ = index.add("well.txt")
        >>> retriever = MMRAGRetriever(location="library", k=1)
        >>> retriever.invoke("How deep is the well?")[0].page_content
        'The well is nine metres deep.'
        >>> retriever.close()
    """

    model_config = ConfigDict(extra="forbid")

    location: str = Field(
        DEFAULT_LOCATION, description="The collection's folder, or the URL of a Qdrant server."
    )
    collection_name: str = Field("mmrag", description="Its name on a server.")
    api_key: SecretStr | None = Field(None, exclude=True, description="Of the server.")
    embed_model: str | None = Field(
        None, description="By default the model that built the collection."
    )
    index: UniversalIndex | None = Field(
        None,
        exclude=True,
        description="One that is open, in place of a location. Only one can have a folder open.",
    )
    k: int = Field(8, ge=1, description="How many documents come back.")
    filters: Filters | None = Field(
        None,
        description="A dict of a metadata key to its value or to a list, any one of which "
        "suffices (file takes names and globs); a Where; or LlamaIndex's MetadataFilters.",
    )
    options: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Other options of UniversalRetriever: weights, instruction, collapse, depth.",
    )

    _opened: UniversalIndex | None = PrivateAttr(None)
    # ``batch`` asks in threads: a folder is opened, and a model loaded, by one of them.
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, context: Any, /) -> None:
        """Refuse settings that would have no effect."""
        opening = {"location", "collection_name", "api_key", "embed_model"} & self.model_fields_set
        if self.index is not None and opening:
            raise ConfigError(f"With index= leave out {', '.join(sorted(opening))}.")

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether ``langchain_core.load.dumps`` stores it; with ``index=`` it cannot be loaded."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The environment variable that ``loads`` takes the key from."""
        return {"api_key": "QDRANT_API_KEY"}

    def close(self) -> None:
        """Release the folder or connection that it has opened; an ``index`` given stays open."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        filters: Filters | None = None,
        image: ImageSource | None = None,
    ) -> list[Document]:
        chosen = self.filters if filters is None else filters
        where = _where(chosen) if isinstance(chosen, Mapping) else chosen
        with self._lock:
            retriever = self._open().as_retriever(similarity_top_k=k or self.k, **self.options)
        return [as_document(hit) for hit in retriever.search(query, image, where=where)]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        manager = run_manager.get_sync()
        return await run_in_executor(
            None, self._get_relevant_documents, query, run_manager=manager, **options
        )

    def _open(self) -> UniversalIndex:
        if self.index is not None:
            return self.index
        if self._opened is None:
            self._opened = UniversalIndex(
                self.location,
                self.embed_model,
                name=self.collection_name,
                api_key=self.api_key.get_secret_value() if self.api_key else None,
            )
        return self._opened


def as_document(hit: Hit) -> Document:
    """What a retriever of mmrag found, as a Document; see ``MMRAGRetriever``."""
    image = node_image(hit.node) or hit.node.metadata.get("page_image")
    found = {
        "score": hit.score,
        "image_path": None if image is None else str(image),
        "ranks": hit.ranks,
        "box": hit.box,
        "description": hit.description,
        "described_by": hit.described_by,
    }
    known = {key: value for key, value in found.items() if value is not None}
    return Document(
        id=hit.node.node_id, page_content=hit.text, metadata={**hit.node.metadata, **known}
    )


def _where(values: Mapping[str, Any]) -> Where:
    """A Where that holds if each key has its value, or one of its values."""
    files = values.get("file", ())
    rest = {key: value for key, value in values.items() if key != "file"}
    return Where(files=(files,) if isinstance(files, str) else tuple(files), metadata=rest)
