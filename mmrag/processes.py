"""Python processes of this library, and what they may use."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

_MOST_THREADS = 16  # decoded images take memory


def start_module(module: str, stderr: int | IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Run a module of this library in a process with pipes to its stdin and from its stdout."""
    here = str(Path(__file__).parents[1])
    # The library may be run from a folder that is not installed, as tests and notebooks do.
    paths = [here, *(path for path in sys.path if path)]
    return subprocess.Popen(
        # -P: a file in the working directory must not shadow a module of the library.
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        # Ctrl-C is for the program, which ends its processes itself.
        start_new_session=True,
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of ``start_module``, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was not sent is not missed
                pipe.close()


def preparing_threads(n_processes: int = 1) -> int:
    """Threads that prepare inputs in each of several processes: a core each, at most 16."""
    return min(_MOST_THREADS, max(1, usable_cores() // n_processes))


def usable_cores() -> int:
    """Cores that this process may use: in a container, fewer than ``os.cpu_count`` says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
