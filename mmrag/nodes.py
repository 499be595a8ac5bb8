"""LlamaIndex nodes: their text, their image, what is embedded, and how they were found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    NodeWithScore,
    TextNode,
)

from mmrag.content import Content, ImageSource
from mmrag.errors import ContentError


class Evidence(BaseModel):
    """A node of a found page that matched: the page itself, a passage, or a figure.

    node_id: of the stored node. kind: page, passage, figure, picture, text or description.
    box: its part of the page, in PDF points; None for the whole.
    """

    node_id: str
    kind: str
    box: tuple[float, float, float, float] | None = None


class Credit(BaseModel):
    """What one ranking contributed to a hit.

    rank: from 1. score: as the ranking gave it, a cosine or a BM25 score.
    credit: its part of the hit's retrieval score.
    """

    rank: int
    score: float
    credit: float


class Hit(NodeWithScore):
    """A NodeWithScore that also says how it was found.

    What depends on the query is kept here. In the node's metadata it would change the node's
    hash, by which LlamaIndex tells whether two retrievers found the same node.

    retrieval_score: the retriever's score; ``score`` may be a reranker's.
    ranks: rank in each ranking of the retriever, from 1.
    view_scores: raw score in each ranking: a cosine, or a BM25 score.
    box: part of the page that matched best, in PDF points.
    evidence: every node of the page that was found, best first.
    description: what a model wrote of an image on the page, which does not stand there.
    described_by: the name of that model.
    explanation: what each ranking contributed, if the retriever was asked to explain.
    rerank_score: the reranker's score in [0, 1]; None if the node was not judged.
    rerank_error: why judging failed.
    rerank_skipped: why the reranker stopped before this node.
    rerank_note: what was missing when the node was judged.

    Examples:
        >>> from llama_index.core.schema import MediaResource, Node
        >>> hit = Hit(node=Node(text_resource=MediaResource(text="a page")), score=0.5)
        >>> hit.text, hit.ranks
        ('a page', {})
    """

    retrieval_score: float | None = None
    ranks: dict[str, int] = Field(default_factory=dict)
    view_scores: dict[str, float] = Field(default_factory=dict)
    box: tuple[float, float, float, float] | None = None
    evidence: list[Evidence] = Field(default_factory=list)
    description: str | None = None
    described_by: str | None = None
    explanation: dict[str, Credit] | None = None
    rerank_score: float | None = None
    rerank_error: str | None = None
    rerank_skipped: str | None = None
    rerank_note: str | None = None

    @property
    def text(self) -> str:
        """The node's text, of any kind of node; LlamaIndex's own takes a TextNode only."""
        return self.node.get_content(MetadataMode.NONE)

    def get_text(self) -> str:
        """The same as ``text``."""
        return self.text

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's registry."""
        return "Hit"


def explained(hit: Hit) -> dict[str, Any]:
    """For JSON, what each ranking contributed, and the nodes found; empty if not asked for."""
    if hit.explanation is None:
        return {}
    rankings = {name: part.model_dump() for name, part in hit.explanation.items()}
    evidence = [node.model_dump() for node in hit.evidence]
    return {"explanation": {"rankings": rankings, "evidence": evidence}}


def as_hit(found: NodeWithScore) -> Hit:
    """The hit itself, or one made from what another retriever found."""
    if isinstance(found, Hit):
        return found
    return Hit(node=found.node, score=found.score, retrieval_score=found.score)


def node_text(node: BaseNode) -> str:
    """The node's own text, without metadata; empty if it has none."""
    # Node, the multimodal class, is no TextNode, and keeps its text in a resource.
    if isinstance(node, TextNode):
        return node.text
    resource = node.text_resource if isinstance(node, Node) else None
    return (resource.text or "") if resource else ""


def node_image(node: BaseNode) -> Path | None:
    """The file of the node's own image, if it has one."""
    if isinstance(node, ImageNode):
        return Path(node.image_path) if node.image_path else None
    resource = node.image_resource if isinstance(node, Node) else None
    return Path(resource.path) if resource and resource.path else None


RESERVED_KEYS = frozenset(
    {
        *("file", "file_path", "folder", "sha256", "page", "label", "page_name", "kind"),
        *("start", "section", "caption", "described_by", "box", "page_image", "text_layer"),
        *("text", "terms", "terms_language", "checksum"),
        *("doc_id", "document_id", "ref_doc_id", "node_id", "node_hash"),
        *("_node_content", "_node_type"),
    }
)
"""Metadata keys that mmrag sets; all others are a user's."""


def given_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a user gave of a node's metadata."""
    return {key: value for key, value in metadata.items() if key not in RESERVED_KEYS}


# The keys under which readers of LlamaIndex and others say where a node comes from.
_NAMES = ("file", "file_path", "file_name", "title", "url", "source")


def document_name(node: BaseNode) -> str:
    """What people call the document of a node: the file or title in its metadata, else its id."""
    names = (node.metadata.get(key) for key in _NAMES)
    return next((str(name) for name in names if name), node.ref_doc_id or node.node_id)


def page_name(metadata: Mapping[str, Any]) -> str:
    """How people call the place of a node: ``page 6 (printed 3)``, ``slide 2``, ``section Fees``.

    metadata: a node's, with ``page_name``, or ``page`` and the ``label`` that is printed on the
    page, or ``section``. Empty if it has none of them.
    """
    if metadata.get("page_name"):
        return str(metadata["page_name"])
    page, label = metadata.get("page"), metadata.get("label")
    if page is None:
        return f"section {metadata['section']}" if metadata.get("section") else ""
    return f"page {page}" if label in (None, "", str(page)) else f"page {page} (printed {label})"


NodeView = Literal["fused", "image", "text"]


def node_content(node: BaseNode, view: NodeView = "fused") -> Content:
    """What of a node is embedded: see ``UniversalEmbedding.node_view``.

    Raises:
        ContentError: For a node that has neither text nor image but sound or film.
    """
    image = image_source(node)
    if image is None:
        if isinstance(node, Node) and node.text_resource is None:
            raise ContentError(f"node {node.node_id}: it has neither text nor image to embed.")
        return Content(node.get_content(metadata_mode=MetadataMode.EMBED))
    # Without metadata: beside an image, a file's name and path would weigh more than they should.
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    # An empty text beside the image would move its vector in some families.
    if view == "image" or not text.strip():
        return Content(image=image)
    if view == "text":
        return Content(node.get_content(metadata_mode=MetadataMode.EMBED))
    return Content(text, image)


def image_source(node: BaseNode) -> ImageSource | None:
    """The image of a Node, ImageNode, Document or ImageDocument: its bytes, file or address."""
    if isinstance(node, ImageNode):
        data, place = node.image, node.image_path or node.image_url
    elif isinstance(node, Node) and node.image_resource is not None:
        resource = node.image_resource
        data = resource.data.decode("ascii") if resource.data else None
        place = str(resource.path or resource.url or "")
    else:
        return None
    if data:
        # LlamaIndex stores base64 with or without the head of a data URL.
        return data if data.startswith("data:") else f"data:image/*;base64,{data}"
    return place or None


def refuse_lost_image(node: BaseNode) -> None:
    """Raise ContentError for a node that would come back from storage without its image.

    LlamaIndex reads every class but its four kinds of node back as a TextNode.
    """
    # type() and not isinstance: an ImageDocument is an ImageNode, and is lost as well.
    if type(node) not in (TextNode, ImageNode, IndexNode, Node) and image_source(node) is not None:
        raise ContentError(
            f"node {node.node_id}: a {type(node).__name__} comes back from storage as a TextNode, "
            "without its image. Give Node(text_resource=..., image_resource=...) instead."
        )
