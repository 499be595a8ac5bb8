"""Work that runs ahead of its consumer, in threads, by a bounded number of results."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue, SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_NAME = "mmrag-ahead"
_PATIENCE = 1.0


@dataclass(frozen=True)
class End:
    """The last result of an item. error: what stopped the work on it, if anything did."""

    error: Exception | None = None


class _Stopped(Exception):
    """The consumer has gone away."""


def run_ahead(
    work: Callable[[Item, Callable[[Result], None]], None],
    items: Sequence[Item],
    workers: int,
    ahead: int,
) -> Generator[tuple[Item, Result | End], None, None]:
    """Yield the results of every item, and an ``End`` after each item's last.

    Args:
        work: called in a thread with an item and a function that takes its results.
        workers: how many items are worked on at once. Their results are interleaved.
        ahead: how many results may wait.

    Closing the generator ends the threads. It waits for them a second at most: they are daemons
    and end with the result they are at.
    """
    todo: SimpleQueue[Item] = SimpleQueue()
    for item in items:
        todo.put(item)
    # Bounded: pages hold images, and reading is often faster than embedding.
    ready: Queue[tuple[Item, Result | End]] = Queue(ahead)
    stop = threading.Event()

    def put(item: Item, result: Result | End) -> None:
        while not stop.is_set():
            try:
                # With a timeout, so that a thread notices when the consumer has gone.
                return ready.put((item, result), timeout=0.1)
            except Full:
                continue
        raise _Stopped

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
