"""Embeddings and reranking: requests in the forms of OpenAI, vLLM, Jina and Cohere."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from mmrag.content import Content, ImageLimits
from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError, ContentError, MMRagError
from mmrag.prompting import estimate_tokens
from mmrag.rerankers.base import Scorer
from mmrag.retrieval.retriever import QUERY_TASKS
from mmrag.server.completions import Message, parts_of
from mmrag.server.schemas import decode_image

MOST_INPUTS = 2048  # as OpenAI takes


class Item(BaseModel):
    """A text, an image (a data URL, or base64), or both."""

    text: str | None = None
    image: str | None = None


Input = str | Item
Inputs = Annotated[list[Input], Field(min_length=1, max_length=MOST_INPUTS)]


class EmbeddingsRequest(BaseModel):
    """What is to be embedded.

    input: texts and images. messages: one item as chat messages, as vLLM takes it; a system
    message is its instruction. dimensions: leading ones to keep. input_type: ``query`` takes
    the instruction of a search, unless ``instruction`` names another.
    """

    model: str
    input: Input | Inputs | None = None
    messages: list[Message] | None = None
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"
    input_type: Literal["query", "document", "search_query", "search_document"] | None = None
    instruction: str | None = None


class RerankRequest(BaseModel):
    """Documents to be ordered for a query. model: default, the first that can."""

    model: str | None = None
    query: Input
    documents: Inputs
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    instruction: str | None = None


def contents_of(request: EmbeddingsRequest, limits: ImageLimits) -> list[Content]:
    """What a request wants embedded.

    Raises:
        ConfigError: For neither or both of input and messages.
        ContentError: For an item.
    """
    if (request.input is None) == (request.messages is None):
        raise ConfigError("Send either input or messages.")
    if request.messages is not None:
        return [_content_of_messages(request.messages, limits)]
    inputs = request.input if isinstance(request.input, list) else [request.input]
    contents = [content_of(each, limits) for each in inputs if each is not None]
    # Jina says query, Cohere search_query.
    is_query = (request.input_type or "").endswith("query")
    if request.instruction is None and not is_query:
        return contents
    return [
        Content(each.text, each.image, request.instruction or QUERY_TASKS[each.modality])
        for each in contents
    ]


def content_of(value: Input, limits: ImageLimits) -> Content:
    """A text or an item as content. Raises ContentError if it is empty or its image unusable."""
    if isinstance(value, str):
        return Content(value)
    return Content(value.text, None if value.image is None else decode_image(value.image, limits))


def _content_of_messages(messages: Sequence[Message], limits: ImageLimits) -> Content:
    instruction, texts, images = None, [], []
    for message in messages:
        for part in parts_of(message):
            if message.role in ("system", "developer"):
                instruction = str(part.get("text", ""))
            elif message.role == "user" and part.get("type") == "text":
                texts.append(str(part.get("text", "")))
            elif message.role == "user" and part.get("type") == "image_url":
                images.append(str(part.get("image_url", {}).get("url", "")))
    if len(images) > 1:
        raise ContentError("An item can have at most one image.")
    text = "\n".join(texts) if texts else None
    return Content(text, decode_image(images[0], limits) if images else None, instruction)


def embeddings_body(
    request: EmbeddingsRequest, contents: Sequence[Content], vectors: NDArray[np.float32]
) -> dict[str, Any]:
    """Vectors as OpenAI sends them. Tokens are estimated, those of images left out."""
    tokens = sum(estimate_tokens(content.text or "") for content in contents)
    rows = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, request)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": request.model, "data": rows, "usage": usage}


def _encoded(vector: NDArray[np.float32], request: EmbeddingsRequest) -> str | list[float]:
    if request.encoding_format == "base64":
        # Little-endian float32: OpenAI's client decodes it with numpy.
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return [float(value) for value in vector]


def scores(
    judge: Scorer | Embedder,
    query: Content,
    documents: Sequence[Content],
    instruction: str | None = None,
) -> list[float]:
    """How well each document serves a query, in [0, 1].

    A reranker judges each pair. An embedder compares their vectors: the cosine, 0 if negative.

    Raises:
        MMRagError: The error of the first document that cannot be judged.
    """
    if isinstance(judge, Scorer):
        judged = judge.judge([(query, document) for document in documents], instruction)
        for outcome in judged:
            if isinstance(outcome, MMRagError):
                raise outcome
        return [float(outcome) for outcome in judged if not isinstance(outcome, MMRagError)]
    task = instruction or QUERY_TASKS[query.modality]
    asked = judge.encode([query], instruction=task)[0]
    # Both have norm 1.
    cosines = judge.encode(documents) @ asked
    return [float(min(1.0, max(0.0, cosine))) for cosine in cosines]


def rerank_body(request: RerankRequest, model: str, scored: Sequence[float]) -> dict[str, Any]:
    """Documents from best to worst, in a form that clients of Jina and of Cohere read."""
    # Of equal scores the earlier document first, so that an answer can be repeated.
    order = sorted(range(len(scored)), key=lambda index: (-scored[index], index))
    results: list[dict[str, Any]] = []
    for index in order[: request.top_n]:
        row: dict[str, Any] = {"index": index, "relevance_score": scored[index]}
        if request.return_documents:
            document = request.documents[index]
            text = document if isinstance(document, str) else document.text
            row["document"] = {"text": text or ""}
        results.append(row)
    texts = [each if isinstance(each, str) else each.text or "" for each in request.documents]
    tokens = sum(map(estimate_tokens, texts))
    return {
        "id": f"rerank-{secrets.token_hex(12)}",
        "object": "list",
        "model": model,
        "results": results,
        "usage": {"total_tokens": tokens},
        # As Cohere's API sends it.
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
