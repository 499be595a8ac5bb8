"""Back-pressure: some requests run, some wait, and the rest are told when to come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mmrag.server.errors import ApiError

_LONGEST_WAIT = 60  # seconds that Retry-After names at most


class Gate:
    """Admits requests in the order they come.

    slots: requests that run at once. waiting: requests that may wait for a slot.
    """

    def __init__(self, slots: int, waiting: int) -> None:
        self.slots = slots
        self.max_waiting = waiting
        self.waiting = 0
        self.running = 0
        self._free = asyncio.Semaphore(slots)
        self._seconds = 1.0  # of a request, a moving mean

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Hold a slot. Raises ApiError 429 if too many wait already."""
        # Refusing at once is kinder than a timeout: the client can go elsewhere or come back.
        if self._free.locked() and self.waiting >= self.max_waiting:
            # How long the queue takes as it is now, this request included.
            wait = self._seconds * (self.waiting + 1) / self.slots
            seconds = min(_LONGEST_WAIT, max(1, math.ceil(wait)))
            raise ApiError(
                429,
                f"{self.running} requests run and {self.waiting} wait; try again in {seconds} s.",
                "too_many_requests",
                {"Retry-After": str(seconds)},
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
            # A moving mean over about the last five requests, since the load changes.
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
