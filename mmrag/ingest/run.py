"""Files into the collection: reading runs ahead, embedding and writing follow in batches.

The collection itself says what is finished, so a run that was killed is simply started again:
finished files cost a hash, and of a half-finished one only the missing nodes are embedded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from llama_index.core.schema import BaseNode
from numpy.typing import NDArray

from mmrag.content import Content
from mmrag.embedders.base import Embedder
from mmrag.errors import CollectionError, ContentError, ReadError
from mmrag.ingest.prefetch import End, run_ahead
from mmrag.ingest.progress import IngestReport, Progress
from mmrag.nodes import node_image, node_text
from mmrag.reading import (
    INSTALL_OCR,
    ReadOptions,
    ReadPage,
    file_sha256,
    find_files,
    ocr_available,
    read_file,
)
from mmrag.store.collection import Collection, FileEntry, folder_of, place_of
from mmrag.store.settings import View
from mmrag.store.terms import DocumentTerms, NodeTerms

log = logging.getLogger(__name__)

_BATCH_ITEMS = 32
_PAGES_AHEAD = 64
# May differ from run to run: limits, and whether recognition is tried, with the same node ids.
_PER_RUN = ("page_seconds", "max_file_bytes", "max_pages", "max_memory_bytes", "ocr")


def reading_settings(options: ReadOptions) -> dict[str, Any]:
    """The options that decide which nodes a file gives."""
    return {key: value for key, value in asdict(options).items() if key not in _PER_RUN}


def ingest(
    paths: Sequence[str | Path],
    collection: Collection,
    embedder: Embedder,
    *,
    options: ReadOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    prune: bool = False,
    workers: int | None = None,
) -> IngestReport:
    """Index files and folders; a second run embeds only what is new.

    Args:
        options: how files are read; default: as the collection was built.
        progress: called after every batch and every file.
        prune: forget files that are gone from the folders given.
        workers: how many files are read at once, each in a process of its own.

    Raises: CollectionError if another embedder or other reading options built the collection,
        EndpointError if a server goes away. What is wrong with single files, pages or nodes is
        in the report. After any error, Ctrl-C or kill the same call goes on where it stopped.
    """
    options = _options(collection, embedder, options)
    started = time.monotonic()
    report = IngestReport()
    plan = _plan(paths, collection, report)
    known = plan.total - len(plan.jobs)
    writer = _Writer(collection, embedder, report, (known, plan.total), progress, started)
    _note_missing_views(collection, embedder, report)
    for entry, path in plan.moves:
        collection.move_file(entry, path)
        if entry.file == path:  # the working directory has moved, with the files in it
            report.unchanged.append(path)
        else:
            report.moved[path] = entry.file
    workers = workers or max(1, min(8, (os.cpu_count() or 1) // 2))

    def read(job: _Job, put: Callable[[ReadPage | ReadError], None]) -> None:
        for page in read_file(job.path, collection.images_dir, options, put, job.sha256):
            put(page)

    events = run_ahead(read, plan.jobs, workers, _PAGES_AHEAD)
    try:
        for job, event in events:
            writer.take(job, event)
        writer.flush()
    finally:
        events.close()
    if writer.n_needs_ocr and options.ocr == "auto" and not ocr_available():
        report.notes.append(
            f"{writer.n_needs_ocr} pages and images have no text that can be read without "
            f"recognition. To add it: {INSTALL_OCR}, then remove their files and index them again."
        )
    if prune:
        _prune(paths, collection, report)
    _drop_outdated(plan.places, collection)
    if report.nodes:
        collection.optimize()
    report.seconds = time.monotonic() - started
    return report


@dataclass(eq=False)
class _Job:
    """One file to index. stale: hashes of its earlier versions, dropped when it is done."""

    path: Path
    sha256: str
    stale: list[str]
    terms: DocumentTerms
    pages: int = 0
    nodes: int = 0
    waiting: int = 0
    read: bool = False
    broken: bool = False
    errors: list[ReadError] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.as_posix()


@dataclass
class _Plan:
    """What a run has to do. places: absolute path to hash of every file found."""

    places: dict[Path, str]
    jobs: list[_Job]
    moves: list[tuple[FileEntry, str]]
    total: int


def _options(
    collection: Collection, embedder: Embedder, options: ReadOptions | None
) -> ReadOptions:
    settings = collection.settings
    if embedder.fingerprint != settings.fingerprint:
        raise CollectionError(
            f"The collection was built by {settings.embedder!r}; {embedder.name!r} cannot add to "
            "it, since vectors of different models cannot be compared. Use the embedder that "
            "built it, or another collection."
        )
    if options is None:
        return ReadOptions(**settings.reading)
    if reading_settings(options) != reading_settings(ReadOptions(**settings.reading)):
        raise CollectionError(
            f"The collection was read with {dict(settings.reading)}, not with "
            f"{reading_settings(options)}. Leave the options out, or use another collection."
        )
    return options


def _plan(paths: Sequence[str | Path], collection: Collection, report: IngestReport) -> _Plan:
    """Sort the files found into unchanged, moved, duplicate, and those to index."""
    files, errors = find_files(paths)
    report.errors += errors
    report.failed += [error.file for error in errors]
    versions = _hashes(files, report)
    entries = collection.files()
    by_hash = {entry.sha256: entry for entry in entries}
    places = {place_of(Path(name)): sha256 for name, sha256 in versions.items()}
    plan = _Plan(places, [], [], total=len(files) + len(errors))
    stands_for: dict[str, str] = {}
    for name, sha256 in versions.items():
        entry = by_hash.get(sha256)
        if entry is not None and not entry.complete:
            entry = None  # read again: its nodes are there, and only what is missing is embedded
        if entry is not None and entry.place == place_of(Path(name)):
            report.unchanged.append(name)
            report.known_errors += entry.errors
        elif sha256 in stands_for:
            report.duplicates[name] = stands_for[sha256]
        elif entry is None:
            stale = [
                old.sha256 for old in entries if old.sha256 != sha256 and _is_earlier(old, name)
            ]
            terms = DocumentTerms(name, collection.settings.language)
            plan.jobs.append(_Job(Path(name), sha256, stale, terms))
        elif _is_gone(entry, places):
            plan.moves.append((entry, name))
        else:
            report.duplicates[name] = entry.file
        stands_for.setdefault(sha256, report.duplicates.get(name, name))
    _keep_moved(plan)
    report.notes += [
        f"{name} has the same content as {first}, which stands for it."
        for name, first in report.duplicates.items()
    ]
    return plan


def _is_earlier(entry: FileEntry, name: str) -> bool:
    """Whether an entry is of the file ``name``, or was before its working directory moved."""
    place = entry.place
    return place == place_of(Path(name)) or (entry.file == name and not place.exists())


def _is_gone(entry: FileEntry, places: dict[Path, str]) -> bool:
    """Whether the path of a finished file no longer has its content."""
    place = entry.place
    if place in places:
        return places[place] != entry.sha256
    return not place.exists()


def _keep_moved(plan: _Plan) -> None:
    """An earlier version of one file that lives on under another path is not stale."""
    kept = {entry.sha256 for entry, _ in plan.moves}
    for job in plan.jobs:
        job.stale = [sha256 for sha256 in job.stale if sha256 not in kept]


def _hashes(files: Sequence[Path], report: IngestReport) -> dict[str, str]:
    def hashed(path: Path) -> str | OSError:
        try:
            return file_sha256(path)
        except OSError as error:
            return error

    found: dict[str, str] = {}
    with ThreadPoolExecutor(2) as pool:
        for path, result in zip(files, pool.map(hashed, files), strict=True):
            if isinstance(result, str):
                found[path.as_posix()] = result
            else:
                message = f"the file cannot be read ({result.strerror})"
                report.errors.append(ReadError(message, file=path.as_posix()))
                report.failed.append(path.as_posix())
    return found


def _note_missing_views(collection: Collection, embedder: Embedder, report: IngestReport) -> None:
    missing = [view for view in collection.settings.views if view not in embedder.modalities]
    if missing:
        report.notes.append(
            f"{embedder.name} embeds {', '.join(sorted(embedder.modalities))} only: nodes get no "
            f"vectors for the view {', '.join(missing)}."
        )


_Event: TypeAlias = ReadPage | ReadError | End


@dataclass(frozen=True)
class _Waiting:
    """A node that is to be embedded and written."""

    job: _Job
    node: BaseNode
    views: dict[View, Content]
    terms: NodeTerms


class _Writer:
    """Embeds nodes in batches across pages and files, and writes them."""

    def __init__(
        self,
        collection: Collection,
        embedder: Embedder,
        report: IngestReport,
        files: tuple[int, int],
        progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        self._collection = collection
        self._embedder = embedder
        self._report = report
        self._done, self._total = files
        self._progress = progress
        self._started = started
        self._waiting: list[_Waiting] = []
        self._pages_waiting = 0
        self.n_needs_ocr = 0

    def take(self, job: _Job, event: _Event) -> None:
        """Deal with one event of reading."""
        match event:
            case ReadPage():
                self._take_page(job, event)
            case ReadError():
                self._fail(job, event)
            case End():
                self._end(job, event.error)

    def flush(self) -> None:
        """Embed and write what waits, and finish the files that are complete by it."""
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        vectors = self._embed(batch)
        self._collection.write(
            [each.node for each in batch], vectors, [each.terms for each in batch]
        )
        self._report.nodes += len(batch)
        self._report.pages += self._pages_waiting
        self._pages_waiting = 0
        jobs = list(dict.fromkeys(each.job for each in batch))
        for each in batch:
            each.job.waiting -= 1
        for job in jobs:
            self._finish_if_complete(job)
        self._tell(jobs[-1])

    def _take_page(self, job: _Job, page: ReadPage) -> None:
        for warning in page.warnings:
            log.info("%s, page %s: %s", job.name, page.page, warning)
        job.pages += 1
        job.nodes += len(page.nodes)
        for node in page.nodes:
            job.terms.read(node_text(node))
        self.n_needs_ocr += page.needs_ocr
        stored = self._collection.existing([node.node_id for node in page.nodes])
        missing = [node for node in page.nodes if node.node_id not in stored]
        self._pages_waiting += bool(missing)
        views = self._collection.settings.views
        cut = any(node.metadata.get("kind") == "passage" for node in page.nodes)
        for node in missing:
            contents = node_views(node, views, self._embedder, cut)
            terms = job.terms.of(node_text(node))
            self._waiting.append(_Waiting(job, node, contents, terms))
            job.waiting += 1
            if sum(len(each.views) for each in self._waiting) >= _BATCH_ITEMS:
                self.flush()

    def _end(self, job: _Job, error: Exception | None) -> None:
        if isinstance(error, (ReadError, ContentError, OSError, MemoryError)):
            job.broken = True
            message = f"reading stopped ({error or type(error).__name__})"
            self._fail(job, ReadError(message, file=job.name, retry=True))
        elif error is not None:
            raise error
        job.read = True
        self._finish_if_complete(job)

    def _fail(self, job: _Job, error: ReadError) -> None:
        job.errors.append(error)
        self._report.errors.append(error)

    def _finish_if_complete(self, job: _Job) -> None:
        if not job.read or job.waiting:
            return
        if job.broken or job.pages == 0:
            self._report.failed.append(job.name)
            self._note_stale(job)
        else:
            self._finish(job)
        self._done += 1
        self._tell(job)

    def _note_stale(self, job: _Job) -> None:
        if job.stale:
            self._report.notes.append(f"{job.name}: its earlier version stays in place.")

    def _finish(self, job: _Job) -> None:
        errors = tuple(sorted(str(error) for error in job.errors))
        folder = folder_of(job.name)
        complete = not any(error.retry for error in job.errors)
        entry = FileEntry(job.name, job.sha256, job.pages, job.nodes, errors, folder, complete)
        # A run that was cut short may have stored some under the path that the file had then.
        self._collection.rename_nodes(job.sha256, job.name)
        self._collection.mark_done(entry)
        if not complete:
            self._report.incomplete.append(job.name)
            self._note_stale(job)
            return
        for sha256 in job.stale:
            self._collection.remove_file(sha256)
        (self._report.replaced if job.stale else self._report.indexed).append(job.name)

    def _embed(self, batch: Sequence[_Waiting]) -> list[dict[View, NDArray[np.float32]]]:
        keys = [(row, view) for row, each in enumerate(batch) for view in each.views]
        results = self._encode([batch[row].views[view] for row, view in keys])
        vectors: list[dict[View, NDArray[np.float32]]] = [{} for _ in batch]
        for (row, view), result in zip(keys, results, strict=True):
            if isinstance(result, ContentError):
                job, node = batch[row].job, batch[row].node
                message = (
                    f"the {view} view of a {node.metadata.get('kind')} has no vector: {result}"
                )
                page = node.metadata.get("page")
                self._fail(job, ReadError(message, file=job.name, page=page))
            else:
                vectors[row][view] = result
        return vectors

    def _encode(self, contents: Sequence[Content]) -> list[NDArray[np.float32] | ContentError]:
        """One vector for each content; a bad one is found by halving the batch."""
        if not contents:
            return []
        try:
            return list(self._embedder.encode(contents, dim=self._collection.settings.dim))
        except ContentError as error:
            if len(contents) == 1:
                return [error]
        half = len(contents) // 2
        return self._encode(contents[:half]) + self._encode(contents[half:])

    def _tell(self, job: _Job) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    files_done=self._done,
                    files_total=self._total,
                    pages=self._report.pages,
                    failures=len(self._report.errors),
                    file=job.name,
                    seconds=time.monotonic() - self._started,
                )
            )


def node_views(
    node: BaseNode, views: Sequence[View], embedder: Embedder, cut: bool = False
) -> dict[View, Content]:
    """What is embedded of a node: its image, its text, or both, as far as it has them.

    A node with text gets no ``image`` view from an embedder that prefers text, and a page that
    was cut into passages no ``text`` view from one that prefers passages.

    Args:
        cut: whether the page that the node belongs to was cut into passages.
    """
    text = node_text(node).strip()
    image = node_image(node)
    possible: dict[View, Content] = {}
    if image is not None and not (text and getattr(embedder, "prefers_text", False)):
        possible["image"] = Content(image=image)
    in_passages = cut and node.metadata.get("kind") == "page"
    if text and not (in_passages and getattr(embedder, "prefers_passages", False)):
        possible["text"] = Content(text=text)
    if image is not None and text:
        possible["fused"] = Content(text=text, image=image)
    return {
        view: possible[view] for view in views if view in possible and view in embedder.modalities
    }


def _prune(paths: Sequence[str | Path], collection: Collection, report: IngestReport) -> None:
    """Forget the files that were under the folders given and are there no longer."""
    folders = [Path(path).resolve() for path in paths if Path(path).is_dir()]
    for entry in collection.files():
        place = entry.place
        if not place.exists() and any(place.is_relative_to(folder) for folder in folders):
            collection.remove_file(entry.sha256)
            report.removed.append(entry.file)


def _drop_outdated(places: dict[Path, str], collection: Collection) -> None:
    """Delete what a run that was cut short has left of files that have changed or gone since."""
    entries = collection.files()
    finished = {entry.sha256 for entry in entries if entry.complete}
    for entry in entries:
        current = places.get(entry.place, entry.sha256)
        if current != entry.sha256 and current in finished:
            collection.remove_file(entry.sha256)
    for sha256, path in collection.unfinished().items():
        place = place_of(Path(path))
        gone = place not in places and not place.exists()
        if gone or places.get(place, sha256) != sha256:
            collection.remove_file(sha256)
