"""``--rerank``: one reranker, or several in a row."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llama_index.core.postprocessor.types import BaseNodePostprocessor

    from mmrag.llms.endpoint import EndpointLLM
    from mmrag.llms.local import LocalLLM

RerankOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rerank",
        metavar="MODEL[@URL]",
        help="Judge three times as many pages first: a reranker, cross-encoder or chat model by "
        "name or folder; MODEL@URL at a /rerank endpoint or a chat server (key: "
        "MMRAG_RERANK_KEY); or 'llm' for the model of --llm. Given twice, the first judges nine "
        "times as many and hands on a third.",
    ),
]


def rerankers(
    names: Sequence[str] | None, llm: EndpointLLM | LocalLLM | None, top_k: int, images: bool
) -> list[BaseNodePostprocessor]:
    """The rerankers of ``--rerank``, in order; each keeps a third of what it is given."""
    names = names or ()
    return [
        _reranker(name, llm, top_k * 3 ** (len(names) - place), images)
        for place, name in enumerate(names, 1)
    ]


def _reranker(
    name: str, llm: EndpointLLM | LocalLLM | None, top_n: int, images: bool
) -> BaseNodePostprocessor:
    from mmrag.rerankers.postprocessor import MLLMReranker

    if at_server := re.fullmatch(r"(.+?)@(https?://.+)", name):
        model, url = at_server.groups()
        # From the environment alone: options show in the list of processes.
        key = os.environ.get("MMRAG_RERANK_KEY")
        return MLLMReranker(model, top_n=top_n, base_url=url, api_key=key)
    if name != "llm":
        return MLLMReranker(name, top_n=top_n)
    if llm is None:
        raise typer.BadParameter("--rerank llm needs --llm or --base-url.")
    from mmrag.llms.endpoint import EndpointLLM
    from mmrag.rerankers.remote import RemoteScorer

    if not isinstance(llm, EndpointLLM):
        # A model that runs here is loaded a second time, to judge.
        return MLLMReranker(llm.model_name, top_n=top_n)
    scorer = RemoteScorer(llm.model, llm.address, images=images)
    return MLLMReranker(scorer=scorer, top_n=top_n)
