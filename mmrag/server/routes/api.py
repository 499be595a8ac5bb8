"""Search, answers and sessions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mmrag.server.answers import answer_events, answer_row, hit_row
from mmrag.server.errors import ApiError
from mmrag.server.guard import SESSION_COOKIE
from mmrag.server.indexing import IndexRequest, index_events
from mmrag.server.schemas import AskRequest, FindRequest, SessionRequest, SnapshotRequest, query_of
from mmrag.server.sse import HEADERS, encoded
from mmrag.server.state import Server

router = APIRouter(prefix="/api")


@router.get("/collections")
async def collections(server: Server) -> dict[str, Any]:
    """What is served."""
    rows = []
    for library in server.libraries:
        files = await to_thread.run_sync(library.files)
        settings = library.collection.settings
        rows.append(
            {
                "name": library.name,
                "files": len(files),
                "pages": sum(entry.pages for entry in files),
                "embedder": settings.embedder,
                "modalities": sorted(library.index.embedder.modalities),
                "llm": library.answering.model_name,
                "dpi": settings.reading.get("dpi", 144),
            }
        )
    return {"collections": rows}


@router.post("/search")
async def search(body: FindRequest, request: Request, server: Server) -> dict[str, Any]:
    """The pages nearest to a text, an image, or both."""
    library = server.libraries.get(body.collection)
    query = query_of(body, server.image_limits)
    hits = await server.run(lambda: library.search(query, explain=body.explain))
    base = server.base(request)
    return {"query": body.query, "hits": [hit_row(hit, library.name, base) for hit in hits]}


@router.post("/ask")
async def ask(body: AskRequest, request: Request, server: Server) -> Response:
    """An answer that cites its pages: server-sent events, or JSON with ``stream: false``."""
    library = server.libraries.get(body.collection)
    query = query_of(body, server.image_limits)
    history = [(turn.role, turn.content) for turn in body.history]
    base = server.base(request)
    if not body.stream:
        question, response = await server.run(lambda: library.answer(query, history))
        return JSONResponse({"question": question, **answer_row(response, library.name, base)})
    events = server.stream(answer_events(library, query, history, base))
    return StreamingResponse(
        await encoded(events, error_name="error"),
        media_type="text/event-stream",
        headers=HEADERS,
    )


@router.post("/index")
async def index(body: IndexRequest, server: Server) -> Response:
    """Index files of this machine, for who may read the collection's folder; see ``indexing``."""
    library = server.libraries.get(body.collection)
    events = server.stream(index_events(library, body), slot=False)
    return StreamingResponse(
        await encoded(events, error_name="error"),
        media_type="text/event-stream",
        headers=HEADERS,
    )


@router.post("/snapshots", status_code=201)
async def snapshot(body: SnapshotRequest, server: Server) -> dict[str, Any]:
    """Keep the collection as it is now."""
    library = server.libraries.get(body.collection)
    return asdict(await to_thread.run_sync(library.create_snapshot, body.name))


@router.post("/session")
async def open_session(body: SessionRequest, request: Request, server: Server) -> Response:
    """Trade an API key for a cookie, which images in a page can carry.

    Raises:
        ApiError: For a key that is not valid.
    """
    if not server.keys.opens(body.key):
        raise ApiError(401, "The API key is not valid.", "invalid_api_key")
    response = Response(status_code=204)
    response.set_cookie(
        SESSION_COOKIE,
        server.keys.new_session(),
        httponly=True,
        # Never sent along with a request that another site starts.
        samesite="strict",
        # A secure cookie would not come back over plain HTTP, as on localhost.
        secure=request.url.scheme == "https",
    )
    return response


@router.delete("/session")
async def end_session(request: Request, server: Server) -> Response:
    """Forget the session of this browser."""
    server.keys.end_session(request.cookies.get(SESSION_COOKIE, ""))
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE)
    return response
