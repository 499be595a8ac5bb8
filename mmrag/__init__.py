"""Multimodal RAG for LlamaIndex: one embedder, one Qdrant collection, answers that cite pages.

Names are loaded when they are first used, so that ``import mmrag`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrag.answering.chat import CitedChatEngine
    from mmrag.answering.engine import CitedQueryEngine
    from mmrag.answering.planning import PlanningQueryEngine
    from mmrag.content import Content, ImageLimits, load_image
    from mmrag.embedders import Embedder, load_embedder
    from mmrag.embedders.remote import RemoteEmbedder
    from mmrag.embedding import UniversalEmbedding
    from mmrag.errors import (
        CollectionError,
        ConfigError,
        ContentError,
        EndpointError,
        MMRagError,
        ModelError,
        ReadError,
    )
    from mmrag.index import UniversalIndex
    from mmrag.ingest.progress import IngestReport
    from mmrag.llms.local import LocalLLM
    from mmrag.queries import Where
    from mmrag.reading import ReadOptions, read_file
    from mmrag.rerankers.postprocessor import MLLMReranker
    from mmrag.retrieval.retriever import UniversalRetriever
    from mmrag.store.collection import Collection, CollectionSettings

__version__ = "0.1.0"

_HOME = {
    "CitedChatEngine": "answering.chat",
    "CitedQueryEngine": "answering.engine",
    "Collection": "store.collection",
    "CollectionError": "errors",
    "CollectionSettings": "store.collection",
    "ConfigError": "errors",
    "Content": "content",
    "ContentError": "errors",
    "Embedder": "embedders",
    "EndpointError": "errors",
    "ImageLimits": "content",
    "IngestReport": "ingest.progress",
    "LocalLLM": "llms.local",
    "MLLMReranker": "rerankers.postprocessor",
    "MMRagError": "errors",
    "ModelError": "errors",
    "PlanningQueryEngine": "answering.planning",
    "ReadError": "errors",
    "ReadOptions": "reading",
    "RemoteEmbedder": "embedders.remote",
    "UniversalEmbedding": "embedding",
    "UniversalIndex": "index",
    "UniversalRetriever": "retrieval.retriever",
    "Where": "queries",
    "load_embedder": "embedders",
    "load_image": "content",
    "read_file": "reading",
}

__all__ = [
    "CitedChatEngine",
    "CitedQueryEngine",
    "Collection",
    "CollectionError",
    "CollectionSettings",
    "ConfigError",
    "Content",
    "ContentError",
    "Embedder",
    "EndpointError",
    "ImageLimits",
    "IngestReport",
    "LocalLLM",
    "MLLMReranker",
    "MMRagError",
    "ModelError",
    "PlanningQueryEngine",
    "ReadError",
    "ReadOptions",
    "RemoteEmbedder",
    "UniversalEmbedding",
    "UniversalIndex",
    "UniversalRetriever",
    "Where",
    "__version__",
    "load_embedder",
    "load_image",
    "read_file",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmrag' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mmrag.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
