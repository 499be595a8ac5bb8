"""Indexing while serving: one thread writes, searches go on beside it."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mmrag.errors import MMRagError
from mmrag.index import UniversalIndex
from mmrag.ingest.progress import IngestReport, Progress

log = logging.getLogger(__name__)

State: TypeAlias = Literal["waiting", "running", "done", "failed", "stopped"]
KEPT = 200  # finished jobs that are remembered


@dataclass
class Job:
    """One file or folder that is added, or of which the files that are gone are forgotten.

    pages: stored in this run so far; of all files that are indexed together with it.
    errors: what could not be read. note: what else became of it. prune: see ``Writer.prune``.
    """

    id: str
    name: str
    path: Path
    uploaded: bool = False
    prune: bool = False
    state: State = "waiting"
    pages: int = 0
    errors: list[str] = field(default_factory=list)
    note: str | None = None
    created: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the path."""
        return {key: value for key, value in asdict(self).items() if key not in ("path", "prune")}


class _Stopped(Exception):
    """Raised within indexing to end it; what is finished is kept."""


class Writer:
    """The one writer of a collection. Files that wait are indexed together.

    ``lock`` is held by whoever changes the collection; searches do not take it.
    """

    def __init__(self, index: UniversalIndex) -> None:
        self.lock = threading.Lock()
        self._index = index
        self._jobs: dict[str, Job] = {}
        self._unread: dict[str, list[str]] = {}
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="mmrag-writer", daemon=True)
        self._thread.start()

    def add(self, path: Path, *, uploaded: bool = False) -> Job:
        """Queue a file or folder. uploaded: it is ours, and deleted if it cannot be indexed."""
        return self._put(Job(str(next(self._numbers)), path.name, path, uploaded))

    def prune(self, folder: Path) -> Job:
        """Queue forgetting the files that are gone from a folder; done after what is added."""
        return self._put(Job(str(next(self._numbers)), folder.name, folder, prune=True))

    def unread(self) -> dict[str, list[str]]:
        """Paths of the files that could not be read, and why; not those that are gone since."""
        # Copied first: the writer changes it meanwhile.
        unread = list(self._unread.items())
        return {name: errors for name, errors in unread if Path(name).exists()}

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        # A server that runs for months must not remember every file.
        for old in [job for job in self._jobs.values() if job.state not in ("waiting", "running")][
            :-KEPT
        ]:
            del self._jobs[old.id]
        self._waiting.put(job)
        return job

    def jobs(self) -> list[Job]:
        """All that is known, oldest first."""
        return list(self._jobs.values())

    def busy(self) -> int:
        """How many jobs wait or run."""
        return sum(job.state in ("waiting", "running") for job in self.jobs())

    def stop(self) -> None:
        """End indexing at the next batch. What was uploaded goes on when the server starts."""
        self._stopping.set()
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            # One run for all that wait: batches of embedding go across files.
            while not self._waiting.empty():
                job = self._waiting.get()
                if job is None:
                    self._stopping.set()
                    break
                batch.append(job)
            if not self._stopping.is_set():
                self._add(batch)
            if self._stopping.is_set():
                _finish(self.jobs(), "stopped")
                return

    def _add(self, jobs: Sequence[Job]) -> None:
        by_path = {job.path.as_posix(): job for job in jobs}
        for job in jobs:
            job.state = "running"
        try:
            with self.lock:
                added = [job for job in jobs if not job.prune]
                report = self._index.add(
                    [job.path for job in added], progress=self._follow(by_path)
                )
                self._note_unread(report)
                for job in added:
                    _record_outcome(job, report)
                for job in jobs:
                    if job.prune:
                        self._prune(job)
                # Once, at the end: searches beside it read what they find for themselves.
                self._index.warm_up()
        # The jobs stay as they are; `_run` marks all that are not finished as stopped.
        except _Stopped:
            return
        except MMRagError as error:
            _finish(jobs, "failed", str(error))
        except Exception:  # the thread goes on with the next files, whatever this one did
            log.exception("Indexing failed")
            _finish(jobs, "failed", "The server failed; its log has the details.")

    def _note_unread(self, report: IngestReport) -> None:
        """Remember files of which nothing could be read, and log all that could not be."""
        for error in report.errors:
            log.warning("%s", error)
        done = (report.indexed, report.replaced, report.incomplete, report.unchanged)
        for name in (*(each for names in done for each in names), *report.moved, *report.failed):
            self._unread.pop(name, None)
        for error in report.errors:
            if error.file in report.failed:
                self._unread.setdefault(error.file, []).append(str(error.args[0]))

    def _prune(self, job: Job) -> None:
        removed = self._index.prune(job.path)
        job.state, job.note = "done", f"Files that are gone and were forgotten: {len(removed)}."
        if not removed:  # nothing to tell, and a folder that changes often would fill the list
            self._jobs.pop(job.id, None)

    def _follow(self, jobs: dict[str, Job]) -> Callable[[Progress], None]:
        def follow(now: Progress) -> None:
            if self._stopping.is_set():
                # The callback is the only place where indexing can be left between two batches.
                raise _Stopped
            if (job := jobs.get(now.file)) is not None:
                job.pages = now.pages
            else:  # a folder: its files are not jobs of their own
                for job in jobs.values():
                    job.pages = now.pages

        return follow


def _finish(jobs: Sequence[Job], state: State, error: str | None = None) -> None:
    for job in jobs:
        if job.state in ("waiting", "running"):
            job.state = state
            job.errors += [error] if error else []


def _record_outcome(job: Job, report: IngestReport) -> None:
    """What became of a job; an upload that is of no use is deleted."""
    name = job.path.as_posix()
    inside = f"{name}/"
    job.errors = [
        ": ".join(
            part
            for part in (
                error.file.removeprefix(inside) if error.file != name else "",
                f"page {error.page}" if error.page is not None else "",
                str(error.args[0]),
            )
            if part
        )
        for error in report.errors
        if error.file == name or error.file.startswith(inside)
    ]
    if name in report.duplicates:
        original = Path(report.duplicates[name]).name
        job.note = f"It has the same content as {original}, which stands for it."
    elif name in report.unchanged:
        job.note = "It is in the collection already."
    job.state = "failed" if name in report.failed else "done"
    # A copy of ours that nothing refers to would only take space; a user's own file is never
    # touched.
    if job.uploaded and (job.state == "failed" or name in report.duplicates):
        job.path.unlink(missing_ok=True)
