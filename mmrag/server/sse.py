"""Server-sent events: their format, and errors that come too late for a status."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from mmrag.server.errors import problem_of

log = logging.getLogger(__name__)

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Of a stream, so that no proxy holds it back."""


@dataclass(frozen=True)
class Event:
    """An event; OpenAI's streams have none with a name."""

    data: dict[str, Any]
    name: str | None = None

    def encode(self) -> bytes:
        """In the format of text/event-stream."""
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {json.dumps(self.data, ensure_ascii=False)}\n\n".encode()


async def encoded(
    events: AsyncIterator[Event], *, error_name: str | None = None, last: bytes = b""
) -> AsyncIterator[bytes]:
    """Events as bytes. An error ends them as an event of its own.

    The first event is made before this returns: what fails before it is raised, and can be an
    HTTP status. error_name: of the event of an error. last: what follows the last event.
    """
    first = await anext(events)
    return _rest(first, events, error_name, last)


async def _rest(
    first: Event, events: AsyncIterator[Event], error_name: str | None, last: bytes
) -> AsyncIterator[bytes]:
    try:
        yield first.encode()
        async for event in events:
            yield event.encode()
    # The status was sent with the first byte: an event is the only way to report a failure.
    except Exception as error:
        problem = problem_of(error)
        if problem.status == 500:
            log.error("An answer broke off", exc_info=error)
        yield Event(problem.body, error_name).encode()
    yield last
