"""Content -> vector: multimodal embedders, free of LlamaIndex and Qdrant.

``load_embedder`` loads one by name. A family is one file in ``families`` and one row of
``registry.FAMILIES``.
"""

from mmrag.embedders.base import Embedder
from mmrag.embedders.known import KNOWN, KnownModel
from mmrag.embedders.registry import FAMILIES, load_backbone, load_embedder

__all__ = ["FAMILIES", "KNOWN", "Embedder", "KnownModel", "load_backbone", "load_embedder"]
