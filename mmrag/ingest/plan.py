"""What a run has to do: which files are new, changed, moved, copies of others, or unchanged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mmrag.errors import ReadError
from mmrag.ingest.metadata import FileMetadata, metadata_of
from mmrag.ingest.progress import IngestReport
from mmrag.ingest.sources import Fetched
from mmrag.reading import file_sha256, find_files, is_url
from mmrag.reading.files import missing_extras
from mmrag.store.collection import Collection
from mmrag.store.entries import FileEntry, Place, find_places, is_missing, only_files
from mmrag.store.terms import DocumentTerms


@dataclass(eq=False)
class Job:
    """One file to index, and how far it is.

    name: its path or URL as it is stored and reported. path: where it is read.
    terms: makes what BM25 finds its nodes by.
    stale: hashes of its earlier versions, dropped when it is done.
    copies: other files of equal content, one of which is read if this one fails.
    metadata: what every node of it gets. tagged: whether nodes were stored before, without it.
    pages, nodes: read so far. waiting: nodes that are not stored yet.
    read: whether reading has ended. broken: whether an error ended it.
    """

    name: str
    path: Path
    sha256: str
    terms: DocumentTerms
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tagged: bool = True
    stale: list[str] = field(default_factory=list)
    copies: list[Job] = field(default_factory=list)
    pages: int = 0
    nodes: int = 0
    waiting: int = 0
    read: bool = False
    broken: bool = False
    errors: list[ReadError] = field(default_factory=list)


@dataclass
class Plan:
    """What a run has to do.

    places: place to hash of every file found. entries: what the collection held. jobs: files
    to read. moves: entries of files that were renamed, with their new path. metadata: path to hash
    and metadata, of the files that are given some. total: how many files were found.
    """

    places: dict[Place, str]
    entries: list[FileEntry]
    jobs: list[Job] = field(default_factory=list)
    moves: list[tuple[FileEntry, str]] = field(default_factory=list)
    metadata: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    total: int = 0


def make_plan(
    paths: Sequence[str | Path],
    collection: Collection,
    report: IngestReport,
    metadata: FileMetadata | None = None,
    fetched: Fetched | None = None,
) -> Plan:
    """Sort the files found; what needs no work goes into the report.

    fetched: what came of the URLs among the paths.

    Raises:
        ConfigError: For ``metadata`` that cannot be used.
    """
    found = find_files([path for path in paths if not is_url(path)])
    report.errors += found.errors
    report.failed += [error.file for error in found.errors]
    fetched = fetched or Fetched()
    copies = fetched.copies
    passed_over = [*(path.as_posix() for path in found.passed_over), *fetched.passed_over]
    note_passed_over(passed_over, report)
    hashes = _hashes(found.files, report) | {url: copy.sha256 for url, copy in copies.items()}
    where = {name: Path(name) for name in hashes} | {url: each.path for url, each in copies.items()}
    known = collection.files()
    files = only_files(known)
    entries = Entries(files, damaged=collection.damaged(files))
    places = dict(zip(hashes, find_places(("", name) for name in hashes), strict=True))
    plan = Plan({places[name]: hashes[name] for name in hashes}, known)
    plan.total = len(found.files) + len(found.errors) + len(copies)
    wanted = _wanted_metadata(hashes, metadata, report)
    plan.metadata = {name: (hashes[name], tags) for name, tags in wanted.items()}
    jobs: dict[str, Job] = {}
    stands_for: dict[str, str] = {}
    for name, sha256 in hashes.items():
        entry = entries.complete.get(sha256)
        if entry is not None and entries.place[entry] == places[name]:
            report.unchanged.append(name)
            report.known_errors += entry.errors
        elif entry is None:
            # Of an incomplete or damaged file only the nodes that are missing are embedded.
            terms = DocumentTerms(name, collection.settings.language)
            stale = entries.earlier(name, places[name], sha256)
            tags = wanted.get(name, entries.metadata((sha256, *stale)))
            job = Job(name, where[name], sha256, terms, tags, stale=stale)
            if sha256 in jobs:
                # Read once; the copy's turn comes only if this one fails by its name.
                jobs[sha256].copies.append(job)
            else:
                jobs[sha256] = job
        elif sha256 in stands_for:
            report.duplicates[name] = stands_for[sha256]
        elif _is_gone(entry, entries.place[entry], plan.places):
            plan.moves.append((entry, name))
        else:
            report.duplicates[name] = entry.file
        stands_for.setdefault(sha256, report.duplicates.get(name, name))
    # An earlier version of one file that lives on under another path is not stale.
    moved = {entry.sha256 for entry, _ in plan.moves}
    for job in jobs.values():
        job.stale = [sha256 for sha256 in job.stale if sha256 not in moved]
    plan.jobs = list(jobs.values())
    return plan


def _wanted_metadata(
    names: Iterable[str], given: FileMetadata | None, report: IngestReport
) -> dict[str, dict[str, Any]]:
    """Path to metadata of the files that are given some; bad sidecars are reported."""
    wanted: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            metadata = metadata_of(name, given)
        except ReadError as error:
            report.errors.append(error)
            continue
        if metadata is not None:
            wanted[name] = metadata
    return wanted


def note_passed_over(names: Sequence[str], report: IngestReport) -> None:
    """Say which files of other types the folders hold, by count and suffix."""
    report.passed_over += names
    if names:
        # The path of an archive stands behind the "::", and has a suffix of its own.
        paths = (PurePath(name.partition("::")[0] if is_url(name) else name) for name in names)
        suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        noun = "file" if len(names) == 1 else "files"
        note = f"{len(names)} {noun} of other types passed over: {counts}"
        report.notes.append(". ".join([note, *missing_extras(suffixes)]))


class Entries:
    """The entries of a collection by what a plan looks them up by."""

    def __init__(self, entries: Sequence[FileEntry], damaged: Sequence[FileEntry]) -> None:
        lost = {entry.sha256 for entry in damaged}
        self._by_hash = {entry.sha256: entry for entry in entries}
        self.complete = {
            entry.sha256: entry for entry in entries if entry.complete and entry.sha256 not in lost
        }
        places = find_places((entry.folder, entry.file) for entry in entries)
        self.place = dict(zip(entries, places, strict=True))
        self._at_place: dict[Place, list[FileEntry]] = defaultdict(list)
        self._of_name: dict[str, list[FileEntry]] = defaultdict(list)
        for entry, place in self.place.items():
            self._at_place[place].append(entry)
            self._of_name[entry.file].append(entry)

    def metadata(self, hashes: Iterable[str]) -> Mapping[str, Any]:
        """The metadata of the first of the files that has an entry; else empty."""
        return next((self._by_hash[each].metadata for each in hashes if each in self._by_hash), {})

    def earlier(self, name: str, place: Place, sha256: str) -> list[str]:
        """Hashes of other versions of a file, here or before its working directory moved."""
        # Relative paths are indexed from a working directory; a project folder may have been moved.
        moved = [entry for entry in self._of_name[name] if is_missing(self.place[entry])]
        found = dict.fromkeys(entry.sha256 for entry in (*self._at_place[place], *moved))
        return [other for other in found if other != sha256]


def _is_gone(entry: FileEntry, place: Place, hashes: Mapping[Place, str]) -> bool:
    """Whether the place of a finished file no longer has its content."""
    if place in hashes:
        return hashes[place] != entry.sha256
    return is_missing(place)


def _hashes(files: Sequence[Path], report: IngestReport) -> dict[str, str]:
    """Path to SHA-256 of each file that can be read."""

    def hashed(path: Path) -> str | OSError:
        try:
            return file_sha256(path)
        except OSError as error:
            return error

    found: dict[str, str] = {}
    # Two, for one reads while the other hashes; a disk gains nothing from more.
    with ThreadPoolExecutor(2) as pool:
        for path, result in zip(files, pool.map(hashed, files), strict=True):
            if isinstance(result, str):
                found[path.as_posix()] = result
            else:
                message = f"the file cannot be read ({result.strerror})"
                report.errors.append(ReadError(message, file=path.as_posix(), retry=True))
                report.failed.append(path.as_posix())
    return found
