"""What requests of the JSON API hold."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from llama_index.core.vector_stores.types import MetadataFilters
from pydantic import BaseModel, ConfigDict, Field

from mmrag.content import ImageLimits, image_size
from mmrag.errors import ConfigError, ContentError
from mmrag.queries import MultimodalQuery, Where
from mmrag.store.filters import as_where

LONGEST_QUERY = 20_000  # characters

Kind = Literal["page", "figure", "passage", "picture", "text", "description"]
PageBound = Annotated[int, Field(ge=1)] | None


class SearchRequest(BaseModel):
    """A search for pages: a text, an image, or both.

    image: a data URL, or base64. collection: a name; default: the first that is served.
    files: paths, names or globs. pages: first and last; null is no bound. filters: LlamaIndex's
    MetadataFilters as JSON.
    """

    # A misspelt filter that is ignored would search everything.
    model_config = ConfigDict(extra="forbid")

    query: str = Field("", max_length=LONGEST_QUERY)
    image: str | None = None
    collection: str | None = None
    top_k: int = Field(8, ge=1, le=100)
    files: list[str] = Field(default_factory=list, max_length=1000)
    pages: tuple[PageBound, PageBound] | None = None
    kinds: list[Kind] = Field(default_factory=list)
    filters: MetadataFilters | None = None

    def where(self) -> Where | None:
        """Which nodes may answer; None for all. Raises ConfigError for a useless filter."""
        if not (self.files or self.pages or self.kinds or self.filters):
            return None
        where = Where(files=tuple(self.files), pages=self.pages, kinds=tuple(self.kinds))
        return as_where(where, self.filters)


class Turn(BaseModel):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str


class AskRequest(SearchRequest):
    """A question; ``history`` holds the conversation before it, oldest first.

    stream: answer with server-sent events.
    """

    history: list[Turn] = Field(default_factory=list, max_length=200)
    stream: bool = True


class FindRequest(SearchRequest):
    """A search whose pages are the result; ``explain`` says what each ranking contributed."""

    explain: bool = False


class SnapshotRequest(BaseModel):
    """A version of a collection to keep; without a name, date and time are its name."""

    name: str | None = None
    collection: str | None = None


class SessionRequest(BaseModel):
    """An API key that is traded for a session of the web page."""

    key: str


def decode_image(text: str, limits: ImageLimits) -> bytes:
    """The bytes of an image that came as a data URL or as base64; never a path or an address.

    Raises:
        ContentError: If it is neither, broken, or larger than ``limits``.
    """
    if text.startswith("data:"):
        head, _, encoded = text.partition(",")
        if not head.endswith(";base64"):
            raise ContentError("The image is a data URL without base64; send data:...;base64,...")
    else:
        encoded = text
    try:
        # Without validate, characters outside the alphabet are skipped, and a path could pass.
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ContentError(
            "The image is neither base64 nor a data URL. Web addresses are not followed: send "
            "the image itself."
        ) from error
    # Reads the header only: a broken or huge image is refused before it takes a slot.
    image_size(data, limits=limits)
    return data


def query_of(request: SearchRequest, limits: ImageLimits) -> MultimodalQuery:
    """The query of a request. Raises ConfigError if it has neither text nor image."""
    image = None if request.image is None else decode_image(request.image, limits)
    if not request.query.strip() and image is None:
        raise ConfigError("The query is empty: give a text, an image, or both.")
    return MultimodalQuery(request.query, image=image, where=request.where(), top_k=request.top_k)
