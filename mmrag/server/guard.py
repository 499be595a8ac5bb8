"""Who may ask, and how much: host names, origins, keys and sizes, before anything else runs."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrag.server.errors import ApiError, problem_of
from mmrag.server.keys import ApiKeys
from mmrag.server.options import ServerOptions

SESSION_COOKIE = "mmrag_session"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# The page and what it is made of hold nothing of a collection; a session is opened with a key.
_OPEN = frozenset({"/", "/health", "/ready", "/favicon.ico", "/api/session"})
_FORM_ROOM = 64 * 1024  # bytes of a form around its file

SECURITY_HEADERS = {
    # Nothing but our own files runs or loads, whatever a document or a model writes into a page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses what may not pass, and bounds what a request sends."""

    def __init__(self, app: ASGIApp, options: ServerOptions, keys: ApiKeys) -> None:
        self.app = app
        self.options = options
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        # Lifespan events; no route takes websockets.
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_upload = scope["method"] == "POST" and scope["path"] == "/api/files"
        limit = self.options.max_body_bytes
        if is_upload:
            limit = self.options.max_upload_bytes + _FORM_ROOM
        try:
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            self._check_key(scope["path"], scope["method"], headers)
            # Refused before it is sent; `bounded` counts those that do not say, or lie.
            if int(headers.get("content-length") or 0) > limit:
                raise too_large(limit)
        except ApiError as error:
            problem = problem_of(error)
            response = JSONResponse(problem.body, problem.status, problem.headers)
            await response(scope, receive, with_headers(send))
            return
        await self.app(scope, bounded(receive, limit), with_headers(send))

    def _check_host(self, headers: Headers) -> None:
        allowed = self.options.hosts
        name = host_name(headers.get("host", ""))
        if allowed and name not in allowed:
            raise ApiError(
                403,
                f"The server does not answer to the name {name!r}; allow it with --allow-host.",
                "host",
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        # Browsers send simple requests of other origins without asking; CORS hides the answer only.
        origin = headers.get("origin")
        if origin is None or method in _SAFE or origin in self.options.cors_origins:
            return
        # By name, as the scheme is not known behind a proxy that ends TLS.
        if urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(
                403,
                f"Requests from web pages of {origin} are refused; allow it with --cors-origin.",
                "origin",
            )

    def _check_key(self, path: str, method: str, headers: Headers) -> None:
        is_open = path in _OPEN or path.startswith("/static/")
        if not self.keys or is_open or self._has_valid_key(headers):
            return
        # A browser asks before it sends a key.
        if method == "OPTIONS" and headers.get("origin") in self.options.cors_origins:
            return
        raise ApiError(
            401,
            "An API key is needed: send it as Authorization: Bearer KEY.",
            "invalid_api_key",
            {"WWW-Authenticate": "Bearer"},
        )

    def _has_valid_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.keys.opens(key.strip()):
            return True
        if (key := headers.get("x-api-key", "")) and self.keys.opens(key):
            return True
        # Images in the page are loaded by the browser itself, which can send nothing but a cookie.
        session = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE)
        return session is not None and self.keys.opens_session(session)


def too_large(limit: int) -> ApiError:
    """413 for a request that is longer than ``limit`` bytes."""
    size = f"{limit // (1024 * 1024)} MiB" if limit >= 1024 * 1024 else f"{limit} bytes"
    return ApiError(413, f"The request is larger than {size}.", "too_large")


def host_name(host: str) -> str:
    """The name in a Host header, without the port: ``[::1]:8321`` is ``::1``."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def bounded(receive: Receive, limit: int) -> Receive:
    """A body that fails when it is longer than ``limit``, whatever its length was said to be."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            # FastAPI passes an HTTPException on where it takes other errors for a broken body.
            raise HTTPException(413, str(too_large(limit)))
        return message

    return counted


def with_headers(send: Send) -> Send:
    """Adds the security headers to every answer."""
    extra = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *extra]
        await send(message)

    return sent
