"""LlamaIndex nodes for what was read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    MediaResource,
    Node,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)

from mmrag.reading.files import node_id
from mmrag.reading.options import PageRecord

# Of no use to a model: paths, hashes and numbers would only change the vectors.
_HIDDEN_KEYS = ["page_image", "sha256", "box", "text_layer", "start"]


@dataclass(frozen=True, slots=True)
class Source:
    """A file that is being read. folder: where its images are kept. name: its path, or its URL."""

    path: Path
    sha256: str
    folder: Path
    name: str

    def node(
        self,
        kind: str,
        text: str,
        *,
        page: int | None = None,
        index: int = 0,
        image: str | None = None,
        **metadata: Any,
    ) -> BaseNode:
        """A node of this file; metadata that is None is left out."""
        known = {"file": self.name, "sha256": self.sha256, "page": page, "kind": kind}
        fields: dict[str, Any] = {
            "id_": node_id(self.sha256, page, kind, index),
            "metadata": {k: v for k, v in (known | metadata).items() if v is not None},
            "excluded_embed_metadata_keys": _HIDDEN_KEYS,
            "excluded_llm_metadata_keys": _HIDDEN_KEYS,
            "relationships": {
                NodeRelationship.SOURCE: RelatedNodeInfo(
                    node_id=node_id(self.sha256, None, "file", 0), node_type=ObjectType.DOCUMENT
                )
            },
        }
        if image is None:
            return TextNode(text=text, **fields)
        mimetype = "image/jpeg" if image.endswith(".jpg") else "image/png"
        return Node(
            text_resource=MediaResource(text=text),
            image_resource=MediaResource(path=Path(image), mimetype=mimetype),
            **fields,
        )


def page_nodes(source: Source, record: PageRecord, repeated: frozenset[str]) -> list[BaseNode]:
    """The page, its passages and its figures; figures whose mark is repeated are left out."""
    shared: dict[str, Any] = {
        "page": record.page,
        "label": record.label,
        "page_name": record.page_name,
        "start": record.start,
    }
    nodes = [
        source.node(
            "page",
            record.text,
            image=record.image,
            page_image=record.image,
            section=record.section,
            text_layer=record.text_layer,
            **shared,
        )
    ]
    shared["page_image"] = record.image
    for index, passage in enumerate(record.passages):
        box = list(passage.box) if passage.box else None
        section = passage.section or record.section
        nodes.append(
            source.node("passage", passage.text, index=index, box=box, section=section, **shared)
        )
    figures = [figure for figure in record.figures if figure.mark not in repeated]
    for index, figure in enumerate(figures):
        nodes.append(
            source.node(
                "figure",
                figure.caption,
                index=index,
                image=figure.image,
                box=list(figure.box) if figure.box else None,
                caption=figure.caption,
                section=figure.section or record.section,
                **shared,
            )
        )
    return nodes
