"""The process in which PyMuPDF runs, so that a broken PDF can neither hang nor crash a program.

Run as ``python -m mmrag.reading.worker``. It takes pickled ``(seconds, operation, arguments)``
from its standard input and answers with pickled results, then ``Done``. A watchdog thread of
the interpreter's own, which needs no lock that MuPDF may hold, ends the process when one step
takes too long; the end of the pipe tells the other side.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmrag.errors import is_environment_error
from mmrag.reading.options import Done, Step


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


def _serve(request: tuple[float, str, str, tuple[Any, ...]], answers: BinaryIO) -> None:
    from mmrag.reading import pdf

    seconds, folder, operation, arguments = request
    os.chdir(folder)  # relative paths are those of the program as it is now
    results = pdf.OPERATIONS[operation](*arguments)
    try:
        for result in _watched(results, seconds):
            _send(result, answers)
        _send(Done(), answers)
    except pdf.OpenProblem as error:
        _send(Done(error.message), answers)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - an engine error is an answer, not our end
        _send(Done(f"{type(error).__name__}: {error}", is_environment_error(error)), answers)


def _watched(results: Iterator[Any], seconds: float) -> Iterator[Any]:
    """The results, each with its own deadline."""
    patience = 1.0
    while True:
        faulthandler.dump_traceback_later(seconds * patience, exit=True)
        try:
            result = next(results, None)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if result is None:
            return
        patience = result.patience if isinstance(result, Step) else 1.0
        yield result


def _send(value: Any, answers: BinaryIO) -> None:
    pickle.dump(value, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()


if __name__ == "__main__":
    main()
