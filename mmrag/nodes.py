"""What a LlamaIndex node holds: its text, its image, and what of it is embedded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, Node, TextNode

from mmrag.content import Content, ImageSource
from mmrag.errors import ContentError


def node_text(node: BaseNode) -> str:
    """The node's own text, without metadata; empty if it has none."""
    if isinstance(node, TextNode):
        return node.text
    resource = node.text_resource if isinstance(node, Node) else None
    return (resource.text or "") if resource else ""


def node_image(node: BaseNode) -> Path | None:
    """The node's own image, if it has one."""
    resource = node.image_resource if isinstance(node, Node) else None
    return Path(resource.path) if resource and resource.path else None


def page_name(metadata: Mapping[str, Any]) -> str:
    """How people call the page of a node: ``page 6``, or ``page 6 (printed 3)``.

    metadata: a node's, with ``page`` and the ``label`` that is printed on the page. Empty if
    there is no page.
    """
    page, label = metadata.get("page"), metadata.get("label")
    if page is None:
        return ""
    return f"page {page}" if label in (None, "", str(page)) else f"page {page} (printed {label})"


NodeView = Literal["fused", "image", "text"]


def node_content(node: BaseNode, view: NodeView = "fused") -> Content:
    """What of a node is embedded: see ``UniversalEmbedding.node_view``.

    Raises: ContentError for a node that has neither text nor image but sound or film.
    """
    image = _node_image(node)
    if image is None:
        if isinstance(node, Node) and node.text_resource is None:
            raise ContentError(f"node {node.node_id}: it has neither text nor image to embed.")
        return Content(node.get_content(metadata_mode=MetadataMode.EMBED))
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    if view == "image" or not text.strip():
        return Content(image=image)
    if view == "text":
        return Content(node.get_content(metadata_mode=MetadataMode.EMBED))
    return Content(text, image)


def _node_image(node: BaseNode) -> ImageSource | None:
    """The image of a Node, ImageNode, Document or ImageDocument."""
    if isinstance(node, ImageNode):
        data, place = node.image, node.image_path or node.image_url
    elif isinstance(node, Node) and node.image_resource is not None:
        resource = node.image_resource
        data = resource.data.decode("ascii") if resource.data else None
        place = str(resource.path or resource.url or "")
    else:
        return None
    if data:
        return data if data.startswith("data:") else f"data:image/*;base64,{data}"
    return place or None
