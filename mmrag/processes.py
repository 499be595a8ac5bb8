"""Python processes of this library, and what they may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO


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


def usable_cores() -> int:
    """Cores that this process may use: in a container, fewer than ``os.cpu_count`` says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
