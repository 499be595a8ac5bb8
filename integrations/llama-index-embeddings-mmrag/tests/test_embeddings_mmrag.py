from llama_index.core import Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.schema import TextNode
from llama_index.embeddings.mmrag import UniversalEmbedding

import mmrag


class Letters:
    """A stand-in for a model: counts of a and b."""

    name, family, dim, fingerprint = "letters", "stub", 2, "1"
    modalities = frozenset({"text"})

    def encode(self, contents, instruction=None, dim=None, progress=False):
        import numpy as np

        counts = [[1 + item.text.count("a"), 1 + item.text.count("b")] for item in contents]
        return (np.array(counts) / np.linalg.norm(counts, axis=1, keepdims=True)).astype("float32")


def test_class():
    names = [base.__name__ for base in UniversalEmbedding.__mro__]
    assert BaseEmbedding.__name__ in names
    assert MultiModalEmbedding.__name__ in names


def test_is_the_class_of_mmrag():
    assert UniversalEmbedding is mmrag.UniversalEmbedding


def test_embeds_nodes_as_an_embed_model():
    model = UniversalEmbedding(embedder=Letters())
    previous = Settings._embed_model
    Settings.embed_model = model
    try:
        nodes = Settings.embed_model([TextNode(text="aaa"), TextNode(text="bbb")])
    finally:
        Settings._embed_model = previous
    query = model.get_query_embedding("aa")
    near, far = (model.similarity(query, node.embedding) for node in nodes)
    assert near > far
