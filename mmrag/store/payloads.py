"""LlamaIndex's nodes as payloads of points, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from mmrag.errors import CollectionError
from mmrag.nodes import node_text
from mmrag.store.engine import Point
from mmrag.store.entries import folder_of
from mmrag.store.images import ImageFolder, original_path, with_image_paths
from mmrag.store.terms import DocumentTerms, NodeTerms, has_terms


def node_payload(node: BaseNode, terms: NodeTerms, images: ImageFolder) -> dict[str, Any]:
    """What is stored of a node; its images from outside of ``images`` are copied there."""
    # A copy: the caller's node keeps its own paths.
    payload = node_to_metadata_dict(with_stored_images(node.model_copy(deep=True), images))
    if text := node_text(node):
        payload["text"] = text
    if folder := folder_of(node.metadata.get("file", "/")):
        payload["folder"] = folder  # so that the path is found from any working directory
    return payload | terms.to_payload() if has_terms(payload) else payload


def payload_node(payload: Mapping[str, Any], images: ImageFolder, location: str) -> BaseNode:
    """The node a payload was made from, with its images' paths as they are here.

    location: of the collection, for the message.

    Raises:
        CollectionError: For a payload that is damaged.
    """
    try:
        node = metadata_dict_to_node(dict(payload))
    except (ValueError, TypeError, LookupError) as error:
        raise CollectionError(
            f"{location} holds a damaged node ({error}). Run mmrag doctor."
        ) from error
    if "sha256" in payload and "file" in node.metadata:
        path = original_path({**payload, "file": node.metadata["file"]}, images.path)
        # The key that LlamaIndex's own readers set, and its tools look for.
        node.metadata["file_path"] = path.as_posix()
        for keys in (node.excluded_llm_metadata_keys, node.excluded_embed_metadata_keys):
            keys.append("file_path")
    return with_image_paths(node, images.found)


def with_stored_images(node: BaseNode, images: ImageFolder) -> BaseNode:
    """Change the image paths of ``node`` in place to how they are stored; see ``ImageFolder``."""
    return with_image_paths(node, lambda path: images.stored(path, node.node_id))


def at_path(point: Point, path: str, images: ImageFolder) -> Point:
    """The point of a node whose file has moved to ``path``."""
    node = metadata_dict_to_node(point.payload)
    node.metadata["file"] = path
    with_image_paths(node, images.found)
    terms = NodeTerms.from_payload(point.payload).renamed(path)
    return dataclasses.replace(point, payload=node_payload(node, terms, images))


def own_terms(node: BaseNode, language: str) -> NodeTerms:
    """What BM25 finds a node by that comes without its document: its text and file name."""
    text = node_text(node)
    document = DocumentTerms(node.metadata.get("file", ""), language)
    document.read(text)
    # Of a single node the first words are its own, and would count twice.
    return dataclasses.replace(document.of(text), first_words="")
