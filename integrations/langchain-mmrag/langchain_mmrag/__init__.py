"""mmrag's embedders and retriever as LangChain takes them."""

from langchain_mmrag.embeddings import MMRAGEmbeddings
from langchain_mmrag.retriever import MMRAGRetriever

__all__ = ["MMRAGEmbeddings", "MMRAGRetriever"]
