"""Images that stand for things named in queries: figures of the files, or drawn by a server."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import openai

from mmrag.embedders.base import Embedder
from mmrag.errors import EndpointError
from mmrag_recipes.corpus import Document
from mmrag_recipes.rows import ImageStore, Item
from mmrag_recipes.vectors import VectorCache, Vectors
from mmrag_recipes.writers import Entity


class Drawer:
    """Images of entities from an OpenAI-compatible image endpoint."""

    def __init__(self, model: str, base_url: str | None, api_key: str | None) -> None:
        self.model = model
        self.client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=4)

    def draw(self, caption: str) -> bytes:
        """Make one image. Raises EndpointError."""
        try:
            reply = self.client.images.generate(
                model=self.model, prompt=caption, response_format="b64_json", n=1
            )
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.model}: {error}") from error
        # Some servers send an address in spite of response_format.
        if not reply.data or not reply.data[0].b64_json:
            raise EndpointError(f"{self.model}: the server sent no image.")
        try:
            return base64.b64decode(reply.data[0].b64_json)
        except ValueError as error:
            raise EndpointError(f"{self.model}: the image is not base64 ({error}).") from error


class Figures:
    """The figures of the files, to stand for entities: found by the embedder."""

    def __init__(self, documents: Sequence[Document], cache: VectorCache) -> None:
        self.figures = [d for d in documents if d.kind in ("figure", "picture") and d.image]
        self.by_page: dict[tuple[str, int | None], list[Document]] = {}
        for figure in self.figures:
            self.by_page.setdefault((figure.file, figure.page), []).append(figure)
        self.embedder: Embedder = cache.embedder
        # Where the embedder has no images, captions stand for the figures.
        by_image = "image" in self.embedder.modalities
        items = [
            Item(image=figure.image) if by_image else Item(text=figure.text or "no caption")
            for figure in self.figures
        ]
        self._vectors: Vectors = cache.encode(items)

    def of_page(self, document: Document) -> Document | None:
        """A figure on the document's page that is not the document itself."""
        on_page = self.by_page.get((document.file, document.page), [])
        return next((f for f in on_page if f.image != document.image), None)

    def besides(self, document: Document) -> bool:
        """Whether there is a figure that is not the document itself."""
        return any(figure.image != document.image for figure in self.figures)

    def of_entity(self, entity: Entity, document: Document, least: float) -> Document | None:
        """The figure most like an entity's name, if its cosine is at least ``least``."""
        if not self.figures:
            return None
        query = self.embedder.encode([entity.name], "image_for_caption")[0]
        scores = self._vectors @ query
        # Best first; the document's own figure would give the answer away.
        for index in np.argsort(-scores, kind="stable").tolist():
            figure: Document = self.figures[index]
            if scores[index] < least:
                return None
            if figure.image != document.image:
                return figure
        return None


def shows(embedder: Embedder, image: Any, caption: str, least: float) -> bool:
    """Whether a drawn image is like its caption; true where the embedder has no images."""
    if "image" not in embedder.modalities:
        return True
    asked = embedder.encode([caption], "image_for_caption")[0]
    return bool(embedder.encode([image])[0] @ asked >= least)


def drawn_image(
    drawer: Drawer, entity: Entity, embedder: Embedder, store: ImageStore, least: float
) -> str | None:
    """Draw an entity. Returns the id of the image; None if it does not show the caption."""
    image_id = store.add(drawer.draw(entity.caption))
    # Image models often miss what they are asked for, and such a row would teach nonsense.
    if shows(embedder, store.path(image_id), entity.caption, least):
        return image_id
    return None
