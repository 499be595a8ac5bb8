"""Indexing files of this machine for ``mmrag index``, which is shown how far it is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import asdict
from hmac import compare_digest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmrag.errors import ConfigError, ReadError
from mmrag.ingest.progress import IngestReport, Progress, error_row
from mmrag.reading.files import is_url
from mmrag.server.errors import ApiError
from mmrag.server.library import Library
from mmrag.server.sse import Event

_PATIENCE = 1.0  # seconds between two signs of life


class IndexRequest(BaseModel):
    """Files and folders of this machine to index.

    secret: from the file ``server.secret`` in the collection's folder. An API key alone must not
    make the server read any file of its user.
    """

    model_config = ConfigDict(extra="forbid")

    paths: list[str]
    secret: str
    prune: bool = False
    metadata: dict[str, Any] | None = None
    collection: str | None = None


class _Left(Exception):
    """Raised within indexing to end it when nobody waits for it; what is finished is kept."""


def index_events(library: Library, request: IndexRequest) -> Generator[Event, None, None]:
    """The events of a run: ``waiting``, ``started``, ``progress``, ``report``; one each second.

    Closed before its end, it stops indexing at the next batch.

    Raises:
        ApiError: 403 for a wrong secret.
        ConfigError: For relative paths, which mean something else in this process.
    """
    # Empty for a collection on a Qdrant server: it has no folder that could hold a secret.
    if not library.secret or not compare_digest(request.secret, library.secret):
        raise ApiError(
            403,
            "Files are indexed by their path only for the user who started the server. Upload them "
            "instead.",
            "secret",
        )
    if not all(is_url(path) or Path(path).is_absolute() for path in request.paths):
        raise ConfigError("Give absolute paths: the server has a working directory of its own.")
    return _events(library, request)


def _events(library: Library, request: IndexRequest) -> Generator[Event, None, None]:
    done: queue.SimpleQueue[Event | IngestReport | Exception] = queue.SimpleQueue()
    left = threading.Event()

    def follow(now: Progress) -> None:
        # The callback is the only place where indexing can be left between two batches.
        if left.is_set():
            raise _Left
        done.put(Event(asdict(now), "progress"))

    def work() -> None:
        try:
            while not library.writer.lock.acquire(timeout=_PATIENCE):
                if left.is_set():
                    return
            done.put(Event({}, "started"))
            try:
                done.put(
                    library.index.add(
                        list(request.paths),
                        progress=follow,
                        prune=request.prune,
                        metadata=request.metadata,
                    )
                )
                library.index.warm_up()
            finally:
                library.writer.lock.release()
        except _Left:
            return
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits for it
            done.put(error)

    # A thread of its own: `progress` is a callback, and this function has to yield.
    thread = threading.Thread(target=work, name="mmrag-index", daemon=True)
    thread.start()
    latest = Event({}, "waiting")
    try:
        yield latest
        while True:
            try:
                event = done.get(timeout=_PATIENCE)
            except queue.Empty:
                # Sent again, so that a reader who has left is noticed.
                yield latest
                continue
            if isinstance(event, Exception):
                raise event
            if isinstance(event, IngestReport):
                yield Event(report_row(event), "report")
                return
            latest = event
            yield latest
    finally:
        left.set()
        thread.join()


def report_row(report: IngestReport) -> dict[str, Any]:
    """A report as JSON."""
    errors = [error_row(error) for error in report.errors]
    return vars(report) | {"errors": errors, "descriptions": None}


def report_from(row: dict[str, Any]) -> IngestReport:
    """The report of a row."""
    errors = [
        ReadError(error["error"], file=error["file"], page=error["page"]) for error in row["errors"]
    ]
    return IngestReport(**(row | {"errors": errors}))
