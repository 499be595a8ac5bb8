"""The process that opens files, so that a broken one can neither hang nor crash a program.

Run as ``python -m mmrag.reading.worker``. It takes pickled ``(seconds, bytes of memory, folder,
operation, arguments)`` from its standard input and answers with pickled results, then ``Done``.
A timer of the system, which needs no lock that MuPDF may hold, ends the process when one step
takes too long; the end of the pipe tells the other side.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from mmrag.errors import is_environment_error
from mmrag.reading.options import Done, Refused, Step

OPERATIONS = {
    "pdf": ("mmrag.reading.pdf", "read_pages"),
    "image": ("mmrag.reading.images", "read_frames"),
    "text": ("mmrag.reading.text", "read_passages"),
    "office": ("mmrag.reading.office", "read_records"),
    "video": ("mmrag.reading.video", "read_stretches"),
    "plugin": ("mmrag.reading.plugins", "read_records"),
    "stretches": ("mmrag.reading.video", "count_stretches"),
    "clip": ("mmrag.reading.video", "read_frames"),
    "count": ("mmrag.reading.evidence", "count_pages"),
    "locate": ("mmrag.reading.evidence", "locate"),
    "mark": ("mmrag.reading.evidence", "mark"),
}
"""What a worker can be asked for: a function that yields answers, and its module.

A module is imported when it is needed: text files need no PDF engine.
"""


def main() -> None:
    """Serve requests until the other side goes away."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    with Path(os.devnull).open("w") as null:
        # Nothing that a library prints may get between the answers or onto the user's screen.
        os.dup2(null.fileno(), sys.stdout.fileno())
        os.dup2(null.fileno(), sys.stderr.fileno())
        try:
            while True:
                _serve(pickle.load(requests), answers)
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            return


def _serve(request: tuple[float, int, str, str, tuple[Any, ...]], answers: BinaryIO) -> None:
    seconds, memory, folder, operation, arguments = request
    os.chdir(folder)  # relative paths are those of the program as it is now
    _limit_memory(memory)
    module, name = OPERATIONS[operation]
    try:
        results = getattr(import_module(module), name)(*arguments)
        for result in _watched(results, seconds):
            _send(result, answers)
        _send(Done(), answers)
    except Refused as error:
        _send(Done(str(error)), answers)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - an engine error is an answer, not our end
        _send(Done(_failure(error), is_environment_error(error)), answers)


def _failure(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, MemoryError):
        return "it needs more memory than max_memory_bytes allows"
    return f"{type(error).__name__}: {error}"


def _limit_memory(limit: int) -> None:
    """Let allocations fail that would take this process over a limit, in bytes."""
    if sys.platform != "linux":  # other systems know the limit but do not keep it
        return
    import resource

    # Data and not address space: thread stacks and arenas reserve much more than they use.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    # The hard limit stays, so that the next request may have a higher one.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _watched(results: Iterator[Any], seconds: float) -> Iterator[Any]:
    """The results, each with its own deadline."""
    patience = 1.0
    while True:
        _set_deadline(seconds * patience)
        try:
            result = next(results, None)
        finally:
            _cancel_deadline()
        if result is None:
            return
        patience = result.patience if isinstance(result, Step) else 1.0
        yield result


def _set_deadline(seconds: float) -> None:
    """End this process when the seconds are over, whatever it does then."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
    else:
        # Only where there is no timer: the dump reads frames that run, and may crash on them.
        faulthandler.dump_traceback_later(seconds, exit=True)


def _cancel_deadline() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    else:
        faulthandler.cancel_dump_traceback_later()


def _send(value: Any, answers: BinaryIO) -> None:
    pickle.dump(value, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()


if __name__ == "__main__":
    main()
