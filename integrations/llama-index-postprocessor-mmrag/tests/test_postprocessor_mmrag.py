import importlib.util

import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor

if importlib.util.find_spec("mmrag.rerankers.postprocessor") is None:
    pytest.skip("this mmrag has no reranker", allow_module_level=True)


def test_class():
    from llama_index.postprocessor.mmrag import MLLMReranker

    names = [base.__name__ for base in MLLMReranker.__mro__]
    assert BaseNodePostprocessor.__name__ in names


def test_is_the_class_of_mmrag():
    from llama_index.postprocessor.mmrag import MLLMReranker

    from mmrag.rerankers.postprocessor import MLLMReranker as ours

    assert MLLMReranker is ours
