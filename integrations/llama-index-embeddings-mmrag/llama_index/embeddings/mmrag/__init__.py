"""mmrag's UniversalEmbedding in LlamaIndex's namespace."""

from mmrag.embedding import UniversalEmbedding

__all__ = ["UniversalEmbedding"]
