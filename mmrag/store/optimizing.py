"""Build the search indexes of a shard on a copy of it, in another process.

qdrant-edge holds Python's GIL while it builds, for minutes on a large shard: nothing else of the
program would run, neither a search nor Ctrl-C. A copy is built beside the shard and takes its
place; until then the shard is as it was, whatever happens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmrag.errors import CollectionError
from mmrag.store.trees import copy_sparse

OLD = ".old"
"""Suffix of a shard while the one that replaces it takes its name."""
_COPY = ".optimize-"
# The engine indexes the vectors of one name in a segment from this size on.
WORTH_BYTES = 10_240_000
"""Bytes of vectors without an index, for each name, that are searched quickly enough without."""
_TICK = 0.5  # seconds

# Low priority: searches go on meanwhile, on the same cores.
_PROGRAM = """
import ctypes, os, signal, sys, qdrant_edge
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the program
if hasattr(os, "nice"):
    os.nice(10)
shard = qdrant_edge.EdgeShard.load(sys.argv[1])
shard.optimize()
shard.flush()
shard.close()
"""


def recover(shard: Path) -> None:
    """Undo what a process that was killed left; call it with the shard's lock held."""
    old = Path(f"{shard}{OLD}")
    if old.is_dir() and not shard.is_dir():
        old.rename(shard)
    for rest in (old, *shard.parent.glob(f"{shard.name}{_COPY}*")):
        shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def copied(shard: Path) -> Iterator[Path]:
    """A copy beside the shard, which is deleted at the end unless it was moved."""
    folder = Path(tempfile.mkdtemp(prefix=f"{shard.name}{_COPY}", dir=shard.parent))
    try:
        shutil.copytree(shard, folder, copy_function=copy_sparse, dirs_exist_ok=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(copy: Path, tick: Callable[[], None] | None = None) -> None:
    """Build the indexes of a shard that no process has open.

    tick: called twice a second; an error from it ends the building.

    Raises:
        CollectionError: If the engine fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, str(copy)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C is for the program, which ends this process itself.
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            # What it writes fits the pipe: a last traceback.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_TICK)
            if tick is not None:
                tick()
    finally:
        process.kill()
        said = process.communicate()[1]
    if process.returncode:
        raise CollectionError(
            f"cannot optimize {copy}: {said.strip() or f'exit code {process.returncode}'}. The "
            "collection is as it was before. Free memory and disk space, and index again."
        )
