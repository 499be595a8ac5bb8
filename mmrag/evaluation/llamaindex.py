"""LlamaIndex's own evaluators over a retriever of pages."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle

from mmrag.evaluation.asking import page_of
from mmrag.evaluation.questions import page_id
from mmrag.nodes import node_image, node_text


class PageRetriever(BaseRetriever):
    """A retriever whose nodes are pages, called ``file.pdf#7``, as LlamaIndex's evaluators need.

    They compare ids, and what mmrag finds of a page may be the page, a passage or a figure. And
    they take the text of a result, which LlamaIndex gives for a TextNode and an ImageNode only: a
    postprocessor that makes results of its own from other nodes would end in a ValueError, and
    ``MultiModalRetrieverEvaluator`` overlooks them. So each page is an ImageNode with text and
    image, once, in the order of its best node.

    Args:
        retriever: a ``UniversalRetriever``, or any whose nodes have ``file`` and ``page``.

    Examples:
        >>> from pathlib import Path
        >>> from mmrag import UniversalIndex
        >>> _ = Path("well.txt").write_text("The well is nine metres deep.")
        >>> with UniversalIndex("library") as index:
        ...     _ = index.add("well.txt")
        ...     hits = PageRetriever(index.as_retriever()).retrieve("How deep is the well?")
        >>> hits[0].node_id
        'well.txt#1'
    """

    def __init__(self, retriever: BaseRetriever) -> None:
        self.retriever = retriever
        super().__init__(callback_manager=retriever.callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _pages(self.retriever.retrieve(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _pages(await self.retriever.aretrieve(query_bundle))


def _pages(found: Sequence[NodeWithScore]) -> list[NodeWithScore]:
    pages: dict[str, NodeWithScore] = {}
    for hit in found:
        name, image = page_id(page_of(hit.node.metadata)), node_image(hit.node)
        node = ImageNode(
            id_=name,
            text=node_text(hit.node),
            image_path=None if image is None else str(image),
            metadata=hit.node.metadata,
        )
        # The first is the best, since hits come in order.
        pages.setdefault(name, NodeWithScore(node=node, score=hit.score))
    return list(pages.values())
