"""mmrag's MLLMReranker in LlamaIndex's namespace."""

from mmrag.rerankers.postprocessor import MLLMReranker

__all__ = ["MLLMReranker"]
