"""Reading in a background thread what later searches need."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from threading import Event, Lock, Thread

from mmrag.errors import MMRagError

log = logging.getLogger(__name__)


class ReadAhead:
    """Takes steps in a thread, one run of them at a time.

    It waits after each step for as long as that took, so that others get at least half of the
    time. An error ends the run and goes to the log: nothing depends on what is read ahead.

    Examples:
        >>> done, ahead = [], ReadAhead()
        >>> ahead.start(done.append(number) for number in range(3))
        >>> ahead.join()
        >>> done
        [0, 1, 2]
    """

    def __init__(self) -> None:
        # Held to start and to stop, which several threads may do at once.
        self._changing = Lock()
        self._stopping = Event()
        self._thread: Thread | None = None

    def start(self, steps: Iterator[None]) -> None:
        """Take every step, in place of those that are left of an earlier call."""
        with self._changing:
            self._end()
            self._stopping = Event()
            # A daemon: a program that ends without closing its collection does not wait for it.
            self._thread = Thread(
                target=_take, args=(steps, self._stopping), name="mmrag-read-ahead", daemon=True
            )
            self._thread.start()

    def join(self) -> None:
        """Wait until all steps are taken."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """End after the step that is being taken; returns when it has ended."""
        with self._changing:
            self._end()

    def _end(self) -> None:
        self._stopping.set()
        self.join()


def _take(steps: Iterator[None], stopping: Event) -> None:
    started = time.perf_counter()
    try:
        for _ in steps:
            if stopping.wait(time.perf_counter() - started):
                return
            started = time.perf_counter()
    except MMRagError as error:
        log.warning("Reading ahead has stopped; searches read what they find: %s", error)
    except Exception:  # nobody waits for the thread who could be told
        log.exception("Reading ahead has failed; searches read what they find.")
