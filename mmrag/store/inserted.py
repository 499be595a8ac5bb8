"""Nodes that an application inserts, beside those that reading makes of files.

They belong to documents by LlamaIndex's ``ref_doc_id`` rather than to files by hash. The payload
says so, and keeps a hash of each, so that what is unchanged is not embedded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    MediaResource,
    Node,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from mmrag.content import load_image
from mmrag.errors import ContentError
from mmrag.nodes import (
    document_name,
    image_source,
    node_image,
    node_text,
    refuse_lost_image,
)
from mmrag.store.engine import (
    CHECKSUM_FIELD,
    LANGUAGE_FIELD,
    TERMS_FIELD,
    AnyOf,
    Engine,
    Filter,
    IsEmpty,
    Point,
)
from mmrag.store.entries import FileEntry
from mmrag.store.images import ImageFolder, image_paths

NODE_KINDS = ("page", "figure", "passage", "picture", "text", "description")

_NAMESPACE = UUID("0c8de1c4-6f0a-4c0a-9b62-6a1f6b9f7d55")
# Payload fields of files that were read, and those that are made here. Metadata of these names
# comes back with the node, but the engine does not see it.
_RESERVED = ("sha256", "folder", "text", "box", TERMS_FIELD, LANGUAGE_FIELD, CHECKSUM_FIELD)


@dataclass(frozen=True)
class Insertion:
    """A node as it will be stored. hash: of all that it holds. file: the name of its document."""

    node: BaseNode
    doc_id: str
    file: str
    hash: str

    @classmethod
    def of(cls, node: BaseNode) -> Insertion:
        """The insertion of a node.

        A node without a source belongs to the document that its metadata names.

        Raises:
            ContentError: For an image that cannot be read, and for a class that would come back
                without its image.
        """
        name = document_name(node)
        named = name if node.ref_doc_id is None else node.ref_doc_id
        doc_id = node.node_id if isinstance(node, Document) else named
        return cls(_storable(node), doc_id, name, content_hash(node))

    def payload(self, stored: BaseNode, file: str) -> dict[str, Any]:
        """The point's payload. stored: the node with its image's path as it is stored."""
        payload = node_to_metadata_dict(stored)
        for key in _RESERVED:
            payload.pop(key, None)
        kind = self.node.metadata.get("kind")
        if kind not in NODE_KINDS:
            kind = "text" if node_image(stored) is None else "picture"
        own = {"node_id": self.node.node_id, "node_hash": self.hash, "kind": kind, "file": file}
        if text := node_text(stored):
            own["text"] = text  # BM25 indexes a node only where its text stands here
        ids = dict.fromkeys(("doc_id", "document_id", "ref_doc_id"), self.doc_id)
        return payload | own | ids


def point_id(node_id: str) -> str:
    """The id of a node's point: Qdrant takes UUIDs, and LlamaIndex any text."""
    try:
        # Only the canonical spelling: Qdrant gives a UUID back in it, whatever was stored.
        return node_id if str(UUID(node_id)) == node_id else str(uuid5(_NAMESPACE, node_id))
    except ValueError:
        return str(uuid5(_NAMESPACE, node_id))


def content_hash(node: BaseNode) -> str:
    """SHA-256 of all that a node holds: text, metadata, the pixels of its image.

    LlamaIndex's own hash leaves out an ImageNode's metadata, and the content of image files.

    Raises:
        ContentError: For an image that cannot be read, and for metadata that is not JSON.
    """
    try:
        metadata = json.dumps(node.model_dump(mode="json")["metadata"], sort_keys=True)
    except ValueError as error:
        raise ContentError(f"node {node.node_id}: its metadata is not JSON: {error}") from error
    # The class too: the same text as another class comes back as another node.
    parts = [type(node).__name__, node_text(node), metadata]
    source = image_source(node)
    if source is not None:
        image = load_image(source)
        # By pixels: a file may be written again under its path.
        parts.append(f"{image.size}{hashlib.sha256(image.tobytes()).hexdigest()}")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def with_image_file(node: BaseNode, images: ImageFolder) -> BaseNode:
    """The node, with an image that it holds as bytes put into a file."""
    if isinstance(node, ImageNode) and node.image:
        path = images.saved(image_source(node) or "", node.node_id)
        update = {"image": None, "image_path": path.as_posix(), "image_mimetype": "image/png"}
        return node.model_copy(update=update)
    if isinstance(node, Node) and node.image_resource is not None and node.image_resource.data:
        path = images.saved(image_source(node) or "", node.node_id)
        return node.model_copy(update={"image_resource": MediaResource(path=path)})
    return node


class InsertedNodes:
    """The inserted nodes of a collection, by document; ``Collection.inserted``."""

    def __init__(self, engine: Engine, images: ImageFolder) -> None:
        self._engine = engine
        self._images = images

    def hashes(self, node_ids: Sequence[str]) -> dict[str, str]:
        """Node id to hash of those that are stored."""
        points = self._engine.retrieve([point_id(id_) for id_ in node_ids])
        stored = (point.payload for point in points)
        return {each["node_id"]: each["node_hash"] for each in stored if "node_hash" in each}

    def entries(self, doc_ids: Iterable[str]) -> dict[str, FileEntry]:
        """Document id to entry of those that were inserted."""
        points = self._engine.retrieve([entry_id(doc_id) for doc_id in doc_ids])
        entries = [FileEntry.from_payload(point.payload) for point in points]
        return {entry.doc_id: entry for entry in entries}

    def count(self, doc_id: str) -> int:
        """How many nodes of a document are stored."""
        return self._engine.count(_of(doc_id))

    def finish(
        self,
        files: Mapping[str, str],
        errors: Mapping[str, Sequence[str]],
        hashes: Mapping[str, str],
    ) -> None:
        """Write the documents' own points: their nodes are stored.

        Args:
            files: document id to the name of the document.
            errors: document id to what could not be inserted of it.
            hashes: document id to the hash of the whole document; default: of its nodes.
        """
        points = []
        for doc_id, file in files.items():
            stored = [point.payload for point in self._engine.scroll(_of(doc_id))]
            of_nodes = hashlib.sha256("".join(sorted(p["node_hash"] for p in stored)).encode())
            failed = tuple(errors.get(doc_id, ()))
            entry = FileEntry(
                file=file,
                sha256=hashes.get(doc_id, of_nodes.hexdigest()),
                pages=len({p["page"] for p in stored if isinstance(p.get("page"), int)}),
                nodes=len(stored),
                errors=failed,
                complete=not failed,
                doc_id=doc_id,
            )
            points.append(Point(entry_id(doc_id), entry.to_payload()))
        if points:
            self._engine.upsert(points)

    def remove(self, doc_id: str, *, keep: Sequence[str] = ()) -> int:
        """Delete a document's nodes but those of the ids in ``keep``; without any, its point too.

        Returns:
            How many nodes went.
        """
        gone = _of(doc_id)
        if keep:
            gone = Filter(gone.must, (*gone.must_not, AnyOf("node_id", tuple(keep))))
        else:
            # The document's own point goes first: cut short, this leaves an unfinished document.
            of_document = AnyOf("doc_id", (doc_id,))
            self._engine.delete(Filter((of_document, AnyOf("kind", ("file",)))))
        return self._delete(gone)

    def remove_nodes(self, node_ids: Sequence[str]) -> None:
        """Delete inserted nodes, and the documents that have none left."""
        points = self._engine.retrieve([point_id(id_) for id_ in node_ids])
        ids = {p.payload["doc_id"] for p in points if "node_hash" in p.payload}
        of = _of(*ids)
        self._delete(Filter((*of.must, AnyOf("node_id", tuple(node_ids))), of.must_not))
        documents = self.entries(ids)
        self.finish({id_: entry.file for id_, entry in documents.items()}, {}, {})
        for id_, entry in self.entries(ids).items():
            if not entry.nodes:
                self.remove(id_)

    def drop_images(self, replaced: Sequence[str], kept: Iterable[Path]) -> None:
        """Delete the stored images of nodes that are about to be replaced, but those ``kept``."""
        old: set[Path] = set()
        for point in self._engine.retrieve([point_id(id_) for id_ in replaced]):
            old |= image_paths(metadata_dict_to_node(point.payload))
        # Before the new points: a kill in between costs an image, not a file that nobody owns.
        self._images.remove(old - set(kept), set())

    def _delete(self, of: Filter) -> int:
        images: set[Path] = set()
        count = 0
        for point in self._engine.scroll(of):
            count += 1
            images |= image_paths(metadata_dict_to_node(point.payload))
        if count:
            self._engine.delete(of)
            self._images.remove(images, set())
        return count


def entry_id(doc_id: str) -> str:
    """The id of a document's own point."""
    return str(uuid5(_NAMESPACE, f"document/{doc_id}"))


def _of(*doc_ids: str) -> Filter:
    """The inserted nodes of documents; those of files, and bookkeeping, have no hash."""
    return Filter((AnyOf("doc_id", doc_ids),), (IsEmpty("node_hash"),))


def _storable(node: BaseNode) -> BaseNode:
    if isinstance(node, Document) and type(node).__module__.startswith("llama_index.core"):
        fields = ("id_", "text_resource", "image_resource", "metadata", "relationships")
        hidden = ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
        return Node(**{name: getattr(node, name) for name in (*fields, *hidden)})
    refuse_lost_image(node)
    return node
