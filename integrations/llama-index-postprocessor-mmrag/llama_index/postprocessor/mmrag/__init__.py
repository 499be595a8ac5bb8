"""mmrag's MLLMReranker in LlamaIndex's namespace."""

from mmrag.reranker import MLLMReranker

__all__ = ["MLLMReranker"]
