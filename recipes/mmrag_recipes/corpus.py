"""The documents of a user's files, as synthesis sees them: passages, pages and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode

from mmrag.errors import ReadError
from mmrag.nodes import node_image, node_text
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag_recipes.console import track
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
    paths: Sequence[str | Path],
    store: ImageStore,
    options: ReadOptions | None = None,
    kept: Path | None = None,
) -> tuple[list[Document], list[str]]:
    """Read files into documents; their images go into the store.

    Args:
        kept: file that remembers what was read, by path, size and time of each file, so that a
            run that stops is gone on with.

    Returns:
        The documents, and a message for each file or page that could not be read, and for each file
        that has the bytes of another one.
    """
    files, errors, _ = find_files(list(paths))
    documents: dict[str, Document] = {}
    messages = [str(error) for error in errors]
    known = _read_kept(kept) if kept else {}
    for path in track(files, len(files), "reading files"):
        # By size and time, not by hash: a folder of thousands of files is looked at in a moment.
        state = path.stat()
        stamp = f"{path.as_posix()}|{state.st_size}|{state.st_mtime_ns}|{options}"
        if stamp not in known:
            known[stamp] = _read(path, store, options)
            if kept:
                # After each file: reading a large folder takes long, and may be stopped.
                with kept.open("a", encoding="utf-8") as file:
                    listed = [asdict(document) for document in known[stamp][0]]
                    record = {"stamp": stamp, "documents": listed, "problems": known[stamp][1]}
                    file.write(json.dumps(record) + "\n")
        found, problems = known[stamp]
        messages += problems
        for document in found:
            # Ids come from the bytes of a file, so a copy under another name has the same.
            twin = documents.setdefault(document.id, document)
            if twin.file != document.file:
                message = f"left out, it has the same content as {twin.file}"
                messages.append(str(ReadError(message, file=path.as_posix())))
                break
    return list(documents.values()), messages


def _read_kept(kept: Path) -> dict[str, tuple[list[Document], list[str]]]:
    """What was read before; a line that a kill cut short is left out."""
    known = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found = [Document(**document) for document in record["documents"]]
        known[record["stamp"]] = found, record["problems"]
    return known


def _read(
    path: Path, store: ImageStore, options: ReadOptions | None
) -> tuple[list[Document], list[str]]:
    errors: list[ReadError] = []
    scratch = store.folder.parent / "pages"
    pages = read_file(path, scratch, options or ReadOptions(), on_error=errors.append)
    found = [_document(node, store) for page in pages for node in page.nodes]
    return found, [str(error) for error in errors]


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
