"""Folders that a server watches: what changes in them is queued for indexing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from mmrag.ingest.watch import require, watch
from mmrag.server.jobs import Writer

log = logging.getLogger(__name__)


class Watcher:
    """Has a writer index folders, and what is new, changed or gone in them, until ``stop``.

    Raises:
        ConfigError: If the extra ``watch`` is missing, or something to watch is no folder.
    """

    def __init__(self, folders: Sequence[Path], writer: Writer) -> None:
        require(folders)
        self._folders = list(folders)
        self._writer = writer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mmrag-watcher", daemon=True)
        self._thread.start()

    @property
    def folders(self) -> list[Path]:
        """The folders, for as long as they are watched."""
        return self._folders if self._thread.is_alive() else []

    def stop(self) -> None:
        """End watching; what is queued stays queued."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            # First, what has changed while no server ran.
            self._queue(self._folders)
            for changed in watch(self._folders, self._stop):
                self._queue(changed)
        except Exception:  # the server goes on without; its status no longer names the folders
            log.exception("Watching stopped")

    def _queue(self, changed: Sequence[Path]) -> None:
        for path in changed:
            self._writer.add(path)
        # After them: a file that was renamed has moved by then, and is not gone.
        for folder in self._folders:
            self._writer.prune(folder)
