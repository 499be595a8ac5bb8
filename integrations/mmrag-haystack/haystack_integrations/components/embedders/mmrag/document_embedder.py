"""Documents with a text, an image or both as vectors."""

from __future__ import annotations

import asyncio
import mimetypes
from dataclasses import replace
from pathlib import Path
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret

from mmrag.content import Content, ImageSource
from mmrag.embedding import UniversalEmbedding
from mmrag.errors import ContentError, naming


@component
class MMRAGDocumentEmbedder:
    """Embeds Documents by their text, their image, or both as one vector.

    The image of a Document is its ``blob``, if the MIME type of that is an image's, else the file
    that its metadata names, if that is an image. A Document from a text or PDF file is embedded by
    its content, whatever file its metadata names.

    Args:
        file_path_meta_field: the metadata that names an image file; None to open no files.
        root_path: the folder that relative paths start from; default: the working directory.
        meta_fields_to_embed: metadata that is embedded along with the text, in front of it.
        embedding_separator: what stands between these.
        progress_bar: show a progress bar on stderr.
        model: as for ``MMRAGTextEmbedder``; the other settings as well.

    Raises:
        ConfigError: For settings that contradict each other. What loading raises (ModelError,
            EndpointError) comes with ``warm_up``.

    Examples:
        >>> embedder = MMRAGDocumentEmbedder("mmrag-nano", device="cpu")
        >>> result = embedder.run([Document(content="The deductible is $500.")])
        >>> len(result["documents"][0].embedding)
        384
    """

    def __init__(
        self,
        model: str = "mmrag-nano",
        *,
        file_path_meta_field: str | None = "file_path",
        root_path: str | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        progress_bar: bool = False,
        dim: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        base_url: str | None = None,
        api_key: Secret | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.file_path_meta_field = file_path_meta_field
        self.root_path = root_path
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.progress_bar = progress_bar
        self.dim = dim
        self.device = device
        self.dtype = dtype
        self.base_url = base_url
        self.api_key = api_key
        self.options = options or {}
        self._embedding = UniversalEmbedding(
            model,
            dim=dim,
            device=device,
            dtype=dtype,
            base_url=base_url,
            api_key=api_key.resolve_value() if api_key else None,
            options=self.options,
        )

    def to_dict(self) -> dict[str, Any]:
        """The component as Haystack stores it; of a key only where it is read from."""
        return default_to_dict(
            self,
            model=self.model,
            file_path_meta_field=self.file_path_meta_field,
            root_path=self.root_path,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            progress_bar=self.progress_bar,
            dim=self.dim,
            device=self.device,
            dtype=self.dtype,
            base_url=self.base_url,
            api_key=self.api_key,
            options=self.options,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MMRAGDocumentEmbedder:
        """The component that ``to_dict`` has stored."""
        loaded: MMRAGDocumentEmbedder = default_from_dict(cls, data)
        return loaded

    def warm_up(self) -> None:
        """Load the model, once; ``run`` does it as well."""
        _ = self._embedding.embedder

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed Documents.

        Returns:
            ``documents``: copies, in the same order, each with an ``embedding`` of L2 norm 1.

        Raises:
            TypeError: For anything but a list of Documents.
            ContentError: For a Document without text and image, and for an image that cannot be
                used; it names the Document's id, or its place in the list.
        """
        if not isinstance(documents, list) or not all(isinstance(d, Document) for d in documents):
            raise TypeError(
                "MMRAGDocumentEmbedder takes a list of Documents; MMRAGTextEmbedder takes a str."
            )
        contents = []
        for document in documents:
            with naming(f"Document {document.id}"):
                contents.append(self._content(document))
        # All in one call: an error then says the place in the whole list.
        vectors = self._embedding.embedder.encode(
            contents, dim=self.dim, progress=self.progress_bar
        )
        pairs = zip(documents, vectors.tolist(), strict=True)
        return {"documents": [replace(document, embedding=vector) for document, vector in pairs]}

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """As ``run``, off the event loop."""
        return await asyncio.to_thread(self.run, documents)

    def _content(self, document: Document) -> Content:
        image = self._image(document)
        words = (document.content or "").strip()
        if not words and image is None:
            raise ContentError("it has neither text nor image; leave it out, or split it off.")
        # Metadata describes a text; an image without one is embedded alone.
        fields = [document.meta.get(key) for key in self.meta_fields_to_embed if words]
        named = [str(value) for value in fields if value is not None]
        text = self.embedding_separator.join([*named, document.content or ""])
        return Content(text if words else None, image)

    def _image(self, document: Document) -> ImageSource | None:
        blob = document.blob
        if blob is not None and (blob.mime_type or "").startswith("image/"):
            return bytes(blob.data)
        name = document.meta.get(self.file_path_meta_field or "")
        if name is None or not (mimetypes.guess_type(str(name))[0] or "").startswith("image/"):
            return None
        return Path(self.root_path or "") / str(name)
