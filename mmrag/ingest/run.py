"""Files into the collection: reading runs ahead, embedding and writing follow in batches.

The collection itself says what is finished, so a run that was killed is simply started again:
finished files cost a hash, and of a half-finished one only the missing nodes are embedded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmrag.embedders.base import Embedder
from mmrag.embedders.late import LateInteraction
from mmrag.errors import CollectionError, ConfigError, ReadError
from mmrag.ingest.cloud import Listing
from mmrag.ingest.copies import Copies
from mmrag.ingest.metadata import FileMetadata
from mmrag.ingest.plan import Job, Plan, make_plan
from mmrag.ingest.prefetch import End, run_ahead
from mmrag.ingest.progress import IngestReport, Progress
from mmrag.ingest.sources import drop_unread, fetch, list_folders
from mmrag.ingest.writer import Writer
from mmrag.nodes import node_text
from mmrag.reading import ReadOptions, ReadPage, ocr, read_file
from mmrag.store.collection import Collection
from mmrag.store.entries import find_place, find_places, is_missing, only_files

_PAGES_AHEAD = 64
_MOST_AHEAD = 64 << 20  # characters of text that wait; images wait on disk
# May differ from run to run: limits, and whether recognition is tried, with the same node ids.
_PER_RUN = ("page_seconds", "max_file_bytes", "max_pages", "max_memory_bytes", "ocr")


def reading_settings(options: ReadOptions) -> dict[str, Any]:
    """The options that decide which nodes a file gives."""
    settings = {key: value for key, value in asdict(options).items() if key not in _PER_RUN}
    if not options.clips:  # collections of 0.1 do not have it
        del settings["clips"]
    return settings


def check_clips(options: ReadOptions, embedder: Embedder) -> None:
    """Raise ConfigError if clips are to be read for an embedder that takes none."""
    if options.clips and "clip" not in embedder.modalities:
        raise ConfigError(
            f"{embedder.name} takes no clips: leave ReadOptions(clips=True) and --clips out, or "
            "use an embedder of a family that does (qwen3_vl)."
        )


def ingest(
    paths: Sequence[str | Path],
    collection: Collection,
    embedder: Embedder,
    *,
    late: Callable[[], LateInteraction | None] | None = None,
    options: ReadOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    prune: bool = False,
    workers: int | None = None,
    metadata: FileMetadata | None = None,
) -> IngestReport:
    """Index files, folders and URLs; a second run embeds only what is new.

    Args:
        paths: a ``str`` with ``://`` is a URL, and is fetched. Do not pass on URLs of people whom
            you do not trust: they may lead into your own network.
        late: gives how the tokens of pages are made, and is called when there is something to
            embed; a collection that keeps tokens needs it.
        options: how files are read; default: as the collection was built.
        progress: called after every batch and every file.
        prune: forget files that are gone from the folders given.
        workers: how many files are read at once, each in a process of its own.
        metadata: for all files found, or a function of the path; laid over what a sidecar file
            (``report.pdf.meta.json``) says. Where neither is given, files keep what they have;
            ``{}`` takes it away. Nothing is embedded again for it.

    Raises:
        ConfigError: For metadata that is not JSON, or uses a key of mmrag's own; for clips with an
            embedder that takes none.
        CollectionError: If another embedder or other reading options built the collection.
        EndpointError: If a server goes away. What is wrong with single files, pages or nodes is in
            the report. After any error, Ctrl-C or kill the same call goes on where it stopped.
    """
    options = _options(collection, embedder, options)
    started = time.monotonic()
    report = IngestReport()
    copies = Copies(collection.images_dir, options.max_file_bytes)
    fetched = fetch(paths, copies, report, progress)
    plan = make_plan(paths, collection, report, metadata, fetched)
    if plan.jobs:
        check_clips(options, embedder)
        _note_missing_views(collection, embedder, report)
    for entry, path in plan.moves:
        collection.move_file(entry, path)
        if entry.file == path:  # the working directory has moved, with the files in it
            report.unchanged.append(path)
        else:
            report.moved[path] = entry.file
    _tag(plan, collection, report)
    # Files that need no reading count as done from the start.
    known = plan.total - sum(1 + len(job.copies) for job in plan.jobs)
    writer = Writer(
        collection,
        embedder,
        report,
        late=_late(collection, late),
        total=plan.total,
        known=known,
        sizes={job.sha256: _size(job.path) for job in plan.jobs},
        progress=progress,
        started=started,
    )
    # Half of the cores: the other half is for preparing and embedding.
    workers = workers or max(1, min(8, (os.cpu_count() or 1) // 2))

    def read(job: Job, put: Callable[[ReadPage | ReadError], None]) -> None:
        where = (job.path, collection.images_dir)
        for page in read_file(*where, options, put, job.sha256, job.name):
            put(page)

    jobs = plan.jobs
    while jobs:
        with (
            # Also after an error or Ctrl-C: it ends the readers and their worker processes.
            closing(run_ahead(read, jobs, workers, _PAGES_AHEAD, _weight, _MOST_AHEAD)) as events,
            writer,
        ):
            for job, event in events:
                writer.take(job, event)
            writer.flush()
        jobs = _copies_of_failed(jobs, report)
    drop_unread(copies, fetched, report)
    if options.ocr == "auto":
        _note_missing_ocr(writer.n_needs_ocr, report)
    report.notes += [
        f"{name} has the same content as {first}, which stands for it."
        for name, first in report.duplicates.items()
    ]
    # After indexing: a file that was renamed has moved by now, and is not gone.
    if prune:
        report.removed += prune_folders(paths, collection, fetched.listings)
    # Last, when the new versions are stored: a kill before leaves the old ones to be found.
    _drop_outdated(plan, collection, report)
    # Also where nothing is new: an earlier run may have been stopped while it built.
    collection.optimize(writer.tell_optimizing)
    report.seconds = time.monotonic() - started
    return report


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since it was hashed; reading reports it
        return 0


def _weight(event: ReadPage | ReadError | End) -> int:
    """Characters of a page."""
    return sum(len(node_text(node)) for node in event.nodes) if isinstance(event, ReadPage) else 0


def _late(
    collection: Collection, late: Callable[[], LateInteraction | None] | None
) -> Callable[[], LateInteraction | None] | None:
    """What makes the collection's tokens; None for a collection without."""
    stored = collection.settings.late
    if stored is None:
        return None
    if late is None:
        raise CollectionError(
            f"The collection keeps tokens of {stored.embedder!r}: give late, so that new pages get "
            "theirs."
        )
    return late


def _tag(plan: Plan, collection: Collection, report: IngestReport) -> None:
    """Bring the metadata of files that are indexed already up to date."""
    if not plan.metadata:
        return
    reading = {job.sha256 for job in plan.jobs}
    entries = {entry.sha256: entry for entry in collection.read_files()}
    for name, (sha256, metadata) in plan.metadata.items():
        entry = entries.get(sha256)
        if entry is None or sha256 in reading or name in report.duplicates:
            continue
        if entry.metadata != metadata:
            collection.tag_file(entry, metadata)


def _copies_of_failed(jobs: Sequence[Job], report: IngestReport) -> list[Job]:
    """Jobs for the next copy of each file that failed; it may fail by its name alone."""
    failed = set(report.failed)
    again = []
    for job in jobs:
        if job.name in failed and job.copies:
            job.copies[0].copies = job.copies[1:]
            again.append(job.copies[0])
        else:
            report.duplicates |= {copy.name: job.name for copy in job.copies}
    return again


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


def _note_missing_ocr(n_pages: int, report: IngestReport) -> None:
    if n_pages and not ocr.available():
        report.notes.append(
            f"Pages and images whose text only recognition can read: {n_pages}. "
            f"To add it: {ocr.INSTALL}, then remove their files and index them again."
        )


def _note_missing_views(collection: Collection, embedder: Embedder, report: IngestReport) -> None:
    missing = [view for view in collection.settings.views if view not in embedder.modalities]
    if missing:
        report.notes.append(
            f"{embedder.name} embeds {', '.join(sorted(embedder.modalities))} only: nodes get no "
            f"vectors for the view {', '.join(missing)}."
        )


def prune_folders(
    paths: Sequence[str | Path],
    collection: Collection,
    listings: Sequence[Listing] | None = None,
) -> list[str]:
    """Forget the files that were under the folders given and are there no longer.

    listings: of those that URLs name; default: they are listed.

    Raises:
        ReadError: If one cannot be listed.
    """
    listings = list_folders(paths) if listings is None else listings
    # Only under folders: a single file that is gone was an error already.
    folders = [Path(path).resolve() for path in paths if Path(path).is_dir()]
    entries = collection.read_files()
    places = find_places((entry.folder, entry.file) for entry in entries)
    removed = []
    for entry, place in zip(entries, places, strict=True):
        gone = is_missing(place) and any(Path(place).is_relative_to(each) for each in folders)
        if gone or any(listing.lacks(entry.file) for listing in listings):
            collection.remove_file(entry.sha256)
            removed.append(entry.file)
    return removed


def _drop_outdated(plan: Plan, collection: Collection, report: IngestReport) -> None:
    """Delete what a run that was cut short has left of files that have changed or gone since."""
    # Reading 20,000 entries takes a second, so a run without changes takes those of its plan.
    changed = plan.jobs or plan.moves or report.removed
    known = collection.files() if changed else plan.entries
    entries = only_files(known)
    finished = {entry.sha256 for entry in entries if entry.complete}
    places = find_places((entry.folder, entry.file) for entry in entries)
    for entry, place in zip(entries, places, strict=True):
        current = plan.places.get(place, entry.sha256)
        if current != entry.sha256 and current in finished:
            collection.remove_file(entry.sha256)
    for sha256, file in collection.unfinished(known).items():
        place = find_place("", file)
        gone = place not in plan.places and is_missing(place)
        if gone or plan.places.get(place, sha256) != sha256:
            collection.remove_file(sha256)
