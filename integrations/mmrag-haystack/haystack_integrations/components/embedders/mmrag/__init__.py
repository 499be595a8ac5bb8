"""mmrag's embedders as components of Haystack."""

from haystack_integrations.components.embedders.mmrag.document_embedder import (
    MMRAGDocumentEmbedder,
)
from haystack_integrations.components.embedders.mmrag.text_embedder import MMRAGTextEmbedder

__all__ = ["MMRAGDocumentEmbedder", "MMRAGTextEmbedder"]
