"""What the routes share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from anyio import to_thread
from fastapi import Depends, Request

from mmrag.content import ImageLimits
from mmrag.server.gate import Gate
from mmrag.server.keys import ApiKeys
from mmrag.server.library import Libraries
from mmrag.server.metrics import Metrics
from mmrag.server.options import ServerOptions

T = TypeVar("T")


@dataclass
class ServerState:
    """One server: its collections, options and counters."""

    libraries: Libraries
    options: ServerOptions
    gate: Gate
    keys: ApiKeys
    metrics: Metrics
    stopping: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def image_limits(self) -> ImageLimits:
        """Of images in requests."""
        return ImageLimits(self.options.max_body_bytes, self.options.max_image_pixels)

    def base(self, request: Request) -> str:
        """How links start, without a slash at the end."""
        return (self.options.public_url or str(request.base_url)).rstrip("/")

    async def run(self, work: Callable[[], T]) -> T:
        """Do work of a model in a thread, when there is a slot for it."""
        async with self.gate.admit():
            return await to_thread.run_sync(work)

    async def stream(
        self, items: Generator[T, None, None], *, slot: bool = True
    ) -> AsyncIterator[T]:
        """Items that are made in threads, in one slot that ends with the last, or the reader.

        slot: False for what waits more than it works, for minutes.
        """
        async with self.gate.admit() if slot else nullcontext():
            try:
                # One item at a time in a thread: the loop stays free, and a reader who leaves stops
                # the model.
                while (item := await to_thread.run_sync(next, items, None)) is not None:
                    yield item
            finally:
                items.close()


def server_state(request: Request) -> ServerState:
    """The server that a request came to."""
    state: ServerState = request.app.state.server
    return state


Server = Annotated[ServerState, Depends(server_state)]
