"""Work that runs ahead of its consumer, in threads, by a bounded number of results."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Entry = TypeVar("Entry")

THREAD_NAME = "mmrag-ahead"
_PATIENCE = 1.0


@dataclass(frozen=True)
class End:
    """The last result of an item. error: what stopped the work on it, if anything did."""

    error: Exception | None = None


class _Stopped(Exception):
    """The consumer has gone away."""


class _Bounded(Generic[Entry]):
    """A queue that takes an entry while it is below both bounds, so a heavy one is still taken."""

    def __init__(self, entries: int, weight: int) -> None:
        self._most = (entries, weight)
        self._held: deque[tuple[Entry, int]] = deque()
        self._weight = 0
        self._changed = threading.Condition()
        self._closed = False

    def put(self, entry: Entry, weight: int) -> None:
        """Add an entry as soon as there is room; raises _Stopped once the queue is closed."""
        with self._changed:
            self._changed.wait_for(self._takes)
            if self._closed:
                raise _Stopped
            self._held.append((entry, weight))
            self._weight += weight
            self._changed.notify_all()

    def _takes(self) -> bool:
        entries, weight = self._most
        return self._closed or (len(self._held) < entries and self._weight < weight)

    def get(self) -> Entry:
        """Wait for the oldest entry."""
        with self._changed:
            self._changed.wait_for(lambda: self._held)
            entry, weight = self._held.popleft()
            self._weight -= weight
            self._changed.notify_all()
            return entry

    def close(self) -> None:
        """Let all who wait to put something go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def run_ahead(
    work: Callable[[Item, Callable[[Result], None]], None],
    items: Sequence[Item],
    workers: int,
    ahead: int,
    weigh: Callable[[Result | End], int] = lambda result: 0,
    most: int = sys.maxsize,
) -> Generator[tuple[Item, Result | End], None, None]:
    """Yield the results of every item, and an ``End`` after each item's last.

    Args:
        work: called in a thread with an item and a function that takes its results.
        workers: how many items are worked on at once. Their results are interleaved.
        ahead: how many results may wait.
        weigh: what a result weighs, such as its bytes.
        most: weight of the results that wait, from which on no other is taken.

    Closing the generator ends the threads. It waits for them a second at most: they are daemons
    and end with the result they are at.
    """
    todo: SimpleQueue[Item] = SimpleQueue()
    for item in items:
        todo.put(item)
    # Bounded: reading is often faster than embedding.
    ready: _Bounded[tuple[Item, Result | End]] = _Bounded(ahead, most)
    stop = threading.Event()

    def put(item: Item, result: Result | End) -> None:
        ready.put((item, result), weigh(result))

    def run() -> None:
        while not stop.is_set():
            try:
                item = todo.get_nowait()
                put(item, _complete(work, item, put))
            except (Empty, _Stopped):
                return

    threads = [
        # Daemons: a worker process that hangs must not keep the program alive.
        threading.Thread(target=run, name=f"{THREAD_NAME}-{number}", daemon=True)
        for number in range(min(workers, len(items)))
    ]
    for thread in threads:
        thread.start()
    try:
        unfinished = len(items)
        while unfinished:
            item, result = ready.get()
            unfinished -= isinstance(result, End)
            yield item, result
    finally:
        stop.set()
        ready.close()
        deadline = time.monotonic() + _PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _complete(
    work: Callable[[Item, Callable[[Result], None]], None],
    item: Item,
    put: Callable[[Item, Result], None],
) -> End:
    """Do all of an item. Whatever goes wrong is for the consumer to judge."""
    try:
        work(item, lambda result: put(item, result))
    except _Stopped:
        raise
    except Exception as error:  # noqa: BLE001 - handed to the consumer's thread
        return End(error)
    return End()
