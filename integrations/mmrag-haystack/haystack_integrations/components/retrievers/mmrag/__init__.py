"""An mmrag collection as a retriever of Haystack."""

from haystack_integrations.components.retrievers.mmrag.retriever import MMRAGRetriever

__all__ = ["MMRAGRetriever"]
