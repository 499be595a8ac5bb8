"""The ASGI application: routes, what guards them, and what happens at the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import metadata
from importlib.util import find_spec

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mmrag.errors import MMRagError
from mmrag.server.errors import ApiError, problem_of
from mmrag.server.gate import Gate
from mmrag.server.guard import Guard
from mmrag.server.keys import ApiKeys
from mmrag.server.library import Libraries
from mmrag.server.metrics import CountRequests, Metrics
from mmrag.server.options import ServerOptions
from mmrag.server.routes import api, files, openai, status, web
from mmrag.server.state import ServerState

log = logging.getLogger(__name__)


def create_app(
    libraries: Libraries, options: ServerOptions | None = None, metrics: Metrics | None = None
) -> FastAPI:
    """An application that serves open collections, and closes them when it ends.

    Examples:
        >>> from mmrag.server.library import open_libraries
        >>> app = create_app(open_libraries(["papers/"]))  # doctest: +SKIP
    """
    options = options or ServerOptions()
    metrics = metrics or Metrics()
    gate, keys = Gate(options.slots, options.waiting), ApiKeys(options.api_keys)
    metrics.watch(gate, libraries)

    mcp = _mcp(libraries, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Starlette runs the lifespan of the outer application only; MCP's sessions need theirs.
        async with AsyncExitStack() as stack:
            if mcp is not None:
                await stack.enter_async_context(mcp.router.lifespan_context(mcp))
            yield
        # Closing waits for the writer thread, which the event loop must not.
        await to_thread.run_sync(libraries.close)

    app = FastAPI(
        title="mmrag",
        version=metadata.version("mmrag"),
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts of another server
        redoc_url=None,
    )
    app.state.server = ServerState(libraries, options, gate, keys, metrics)
    for routes in (status, api, files, openai, web):
        app.include_router(routes.router)
    if mcp is not None:
        # Its own path is /mcp already: mounted there, it would be /mcp/mcp.
        app.router.routes.extend(mcp.routes)
    for kind in (MMRagError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _error_response)
    # The last one added is the first that a request meets.
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key"],
        )
    app.add_middleware(Guard, options=options, keys=keys)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


async def _error_response(_: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's form."""
    if isinstance(error, RequestValidationError):
        error = ApiError(400, _field_errors(error), "invalid_request")
    elif isinstance(error, HTTPException):
        error = ApiError(
            error.status_code, str(error.detail), "http_error", dict(error.headers or {})
        )
    problem = problem_of(error)
    # Only what is not the client's fault: its message hides the cause, so the log must hold it.
    if problem.status == 500:
        log.error("A request failed", exc_info=error)
    return JSONResponse(problem.body, problem.status, problem.headers)


def _field_errors(error: RequestValidationError) -> str:
    """What is wrong with a request, field by field: ``body.top_k: Input should be ...``."""
    parts = [
        f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()
    ]
    return "; ".join(parts)


def _mcp(libraries: Libraries, options: ServerOptions) -> Starlette | None:
    """The application of MCP over HTTP; None without its extra."""
    if find_spec("mcp") is None:
        return None
    # The extra is optional.
    from mcp.server.transport_security import TransportSecuritySettings

    from mmrag.server.mcp_tools import create_mcp

    # Names and origins are checked by Guard, for MCP as for everything else.
    checked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    return create_mcp(libraries).streamable_http_app(
        transport_security=checked, max_request_body_size=options.max_body_bytes
    )
