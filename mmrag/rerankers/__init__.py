"""Query and document -> score: models that judge the two together.

``load_scorer`` loads one by name; ``postprocessor.MLLMReranker`` is its LlamaIndex face.
"""

from mmrag.rerankers.base import Scorer
from mmrag.rerankers.prompts import PROMPTS, RerankPrompt, find_prompt
from mmrag.rerankers.registry import RERANKERS, ScorerOptions, all_rerankers, load_scorer

__all__ = [
    "PROMPTS",
    "RERANKERS",
    "RerankPrompt",
    "Scorer",
    "ScorerOptions",
    "all_rerankers",
    "find_prompt",
    "load_scorer",
]
