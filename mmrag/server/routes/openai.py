"""What clients of OpenAI, Jina and Cohere call."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mmrag.server.completions import ChatChunks, ChatRequest, model_rows, read_chat
from mmrag.server.errors import no_model
from mmrag.server.sse import HEADERS, encoded
from mmrag.server.state import Server
from mmrag.server.vectors import (
    EmbeddingsRequest,
    RerankRequest,
    content_of,
    contents_of,
    embeddings_body,
    rerank_body,
    scores,
)

router = APIRouter()


@router.get("/v1/models")
async def models(server: Server) -> dict[str, Any]:
    """Collections, which chat; embedders; and rerankers."""
    return {"object": "list", "data": model_rows(server.libraries.model_names(), server.started)}


@router.get("/v1/models/{model:path}")
async def model(model: str, server: Server) -> dict[str, Any]:
    """One of them."""
    if model not in server.libraries.model_names():
        raise no_model(model, server.libraries.model_names())
    return model_rows([model], server.started)[0]


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request, server: Server) -> Response:
    """An answer from the collection that ``model`` names, with links to its pages."""
    library = server.libraries.chat_model(body.model)
    chunks = ChatChunks(library, body, read_chat(body, server.image_limits), server.base(request))
    if not body.stream:
        await server.run(lambda: [None for _ in chunks])
        return JSONResponse(chunks.completion())
    events = await encoded(server.stream(iter(chunks)), last=b"data: [DONE]\n\n")
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, server: Server) -> dict[str, Any]:
    """Vectors of texts and images, by the embedder of a collection."""
    embedder = server.libraries.embedder(body.model)
    contents = contents_of(body, server.image_limits)
    vectors = await server.run(lambda: embedder.encode(contents, dim=body.dimensions))
    return embeddings_body(body, contents, vectors)


# vLLM and Jina, Jina, and Cohere call it by these names.
@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(body: RerankRequest, server: Server) -> dict[str, Any]:
    """Documents ordered for a query, by the reranker that is loaded, else by an embedder."""
    judge = server.libraries.judge(body.model)
    query = content_of(body.query, server.image_limits)
    documents = [content_of(each, server.image_limits) for each in body.documents]
    scored = await server.run(lambda: scores(judge, query, documents, body.instruction))
    return rerank_body(body, judge.name, scored)
