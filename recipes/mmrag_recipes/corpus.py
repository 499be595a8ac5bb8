"""The documents of a user's files, as synthesis sees them: passages, pages and figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode

from mmrag.errors import ReadError
from mmrag.nodes import node_image, node_text
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag_recipes.rows import ImageStore, Item, Modality


@dataclass(frozen=True)
class Document:
    """One passage, page or figure. image: id in the store; caption: of a figure."""

    id: str
    kind: str
    text: str
    image: str | None
    section: str
    file: str
    page: int | None

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What it can be handed out as."""
        if self.image is None:
            return ("text",) if self.text.strip() else ()
        # A figure's text is its caption, which names it: alone it is no document.
        if not self.text.strip():
            return ("image",)
        return ("image", "fused") if self.kind == "figure" else ("text", "image", "fused")

    def item(self, modality: Modality, without: str | None = None) -> Item:
        """The document as an item, less a sentence that became the query."""
        text = self.text
        if without:
            # In the text, the sentence may be broken over lines.
            pattern = r"\s*".join(map(re.escape, without.split()))
            text = re.sub(pattern, " ", text).strip()
        return Item(
            text=None if modality == "image" else text,
            image=None if modality == "text" else self.image,
        )

    @property
    def place(self) -> str:
        """File and page, for the source field of rows."""
        return Path(self.file).name + (f"#{self.page}" if self.page is not None else "")


def read_corpus(
    paths: Sequence[str | Path], store: ImageStore, options: ReadOptions | None = None
) -> tuple[list[Document], list[str]]:
    """Read files into documents; their images go into the store.

    Returns: the documents, and a message for each file or page that could not be read, and for
        each file that has the bytes of another one.
    """
    files, errors = find_files(list(paths))
    documents: dict[str, Document] = {}
    scratch = store.folder.parent / "pages"
    for path in files:
        pages = read_file(path, scratch, options or ReadOptions(), on_error=errors.append)
        for node in (node for page in pages for node in page.nodes):
            twin = documents.setdefault(node.node_id, _document(node, store))
            if twin.file != node.metadata["file"]:
                message = f"left out, it has the same content as {twin.file}"
                errors.append(ReadError(message, file=path.as_posix()))
                break
    return list(documents.values()), [str(error) for error in errors]


def _document(node: BaseNode, store: ImageStore) -> Document:
    metadata: dict[str, Any] = node.metadata
    image = node_image(node)
    return Document(
        id=node.node_id,
        kind=metadata["kind"],
        text=node_text(node),
        image=store.add(image) if image else None,
        section=metadata.get("section") or "",
        file=metadata["file"],
        page=metadata.get("page"),
    )
