"""What a request is refused with: our errors as HTTP answers in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mmrag.errors import (
    CollectionError,
    ConfigError,
    ContentError,
    EndpointError,
    MissingCollectionError,
    MMRagError,
    ReadError,
)


class ApiError(MMRagError):
    """A request that is refused with an HTTP status.

    code: a short name of the reason, for programs. headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


def not_found(what: str) -> ApiError:
    """404 for a file, page or model that is not there."""
    return ApiError(404, what, "not_found")


def no_model(name: str, known: Iterable[str]) -> ApiError:
    """404 for a model, as OpenAI's client knows it."""
    return ApiError(
        404, f"There is no model {name!r} here; use {', '.join(known)}.", "model_not_found"
    )


@dataclass(frozen=True)
class Problem:
    """An error as it is sent."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


# The first class that fits decides, so a subclass stands before its base.
_STATUS: tuple[tuple[type[MMRagError], int, str], ...] = (
    (ContentError, 400, "invalid_content"),
    (ConfigError, 400, "invalid_request"),
    (ReadError, 422, "unreadable_file"),
    (MissingCollectionError, 404, "no_collection"),
    (CollectionError, 503, "collection_unavailable"),
    (EndpointError, 502, "model_server_failed"),
)


def problem_of(error: Exception) -> Problem:
    """The HTTP answer for an error; one that is not ours says nothing about its cause."""
    if isinstance(error, ApiError):
        return _problem(error.status, str(error), error.code, error.headers)
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return _problem(status, str(error), code)
    if isinstance(error, MMRagError):
        return _problem(500, str(error), "failed")
    # The text of an unknown error may hold paths or secrets.
    return _problem(500, "The server failed; its log has the details.", "internal_error")


def _problem(
    status: int, message: str, code: str, headers: dict[str, str] | None = None
) -> Problem:
    # The two types that OpenAI's clients tell apart.
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "code": code, "param": None}
    return Problem(status, {"error": error}, headers or {})
