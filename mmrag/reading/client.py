"""The side of the program that asks worker processes; see ``worker``."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrag.processes import end_process, start_module
from mmrag.reading.options import DEADLINE, Done, ReadOptions


class WorkerDied(Exception):
    """The worker was ended by its deadline, was killed from outside, or crashed.

    retry: whether the same request may succeed another time: it took too long, or something
        else, such as the system when memory runs out, killed the worker.
    """

    def __init__(self, exit_code: int) -> None:
        self.late = exit_code == DEADLINE
        self.killed = exit_code in (-signal.SIGKILL, -signal.SIGTERM)
        self.retry = self.late or self.killed
        super().__init__(
            "took too long" if self.late else "was killed" if self.killed else "crashed"
        )


class RequestFailed(Exception):
    """The worker could not do what was asked; the message says why. retry: see ``ReadError``."""

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class _Worker:
    """One worker process with its pipes."""

    def __init__(self) -> None:
        self.process = start_module("mmrag.reading.worker")

    def ask(
        self, options: ReadOptions, operation: str, arguments: tuple[Any, ...]
    ) -> Iterator[Any]:
        """Yield the answers to a request.

        Raises:
            WorkerDied: If the worker ends, or takes too long.
            RequestFailed: If the request raises in the worker.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            limits = (options.page_seconds, options.max_memory_bytes)
            request = (*limits, str(Path.cwd()), operation, arguments)
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            while not isinstance(answer := pickle.load(self.process.stdout), Done):
                yield answer
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            # A worker says nothing more when it dies; its exit code tells why.
            raise WorkerDied(self.process.wait()) from error
        if answer.error is not None:
            raise RequestFailed(answer.error, retry=answer.retry)

    def close(self) -> None:
        end_process(self.process)


_idle: list[_Worker] = []


def ask(options: ReadOptions, operation: str, *arguments: Any) -> Iterator[Any]:
    """Yield the answers of a worker process, within the limits on time and memory.

    A worker is kept for the next request. Each concurrent request has a worker of its own.
    Reading all answers keeps the worker; leaving early ends it.

    Raises:
        WorkerDied: If the worker ends, or takes too long.
        RequestFailed: If the request raises in the worker.
    """
    worker = _waiting() or _Worker()
    # A worker with answers left in its pipe would give them to the next request.
    sound = False
    try:
        yield from worker.ask(options, operation, arguments)
        sound = True
    except RequestFailed:
        sound = True
        raise
    finally:
        if sound:
            _idle.append(worker)
        else:
            worker.close()


def _waiting() -> _Worker | None:
    """A worker that waits for work, if there is one that nobody else has ended."""
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.close()
    return None


@atexit.register
def close_workers() -> None:
    """End the worker processes that wait for work."""
    while _idle:
        _idle.pop().close()


if hasattr(os, "register_at_fork"):
    # A forked child must not talk through its parent's pipes.
    os.register_at_fork(after_in_child=_idle.clear)
