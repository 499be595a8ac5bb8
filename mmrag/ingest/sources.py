"""Sources that are not on this machine: fetched when asked, each only if it has changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from mmrag.errors import ReadError, is_environment_error
from mmrag.ingest.cloud import Listing, list_files, open_stored
from mmrag.ingest.copies import Copies, Copy, Download
from mmrag.ingest.prefetch import run_ahead
from mmrag.ingest.progress import IngestReport, Progress
from mmrag.reading import is_url

if TYPE_CHECKING:
    import httpx

Opener: TypeAlias = Callable[[Mapping[str, str]], AbstractContextManager[Download | None]]
"""Opens a source that may still have the version given; then it gives None."""

# Few: several URLs are most often of one server, which has other visitors.
_AT_ONCE = 4


@dataclass
class Fetched:
    """What came of the URLs. copies: by the names under which they are indexed.

    passed_over: names of files of other types. listings: of the folders.
    """

    copies: dict[str, Copy] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)


def fetch(
    sources: Sequence[str | Path],
    copies: Copies,
    report: IngestReport,
    progress: Callable[[Progress], None] | None = None,
) -> Fetched:
    """Copy what the URLs among the sources name.

    What cannot be had is in the report, and the rest goes on.
    """
    fetched = Fetched()
    if not any(map(is_url, sources)):
        return fetched
    # The client takes a tenth of a second to import.
    from mmrag.ingest.web import new_client

    copies.clean()
    found: dict[str, Copy] = {}
    started, done = time.monotonic(), 0
    with new_client() as client:
        openers = _openers(sources, client, fetched, report)

        def copy(name: str, put: Callable[[Copy], None]) -> None:
            known, version = copies.find(name) or (None, {})
            with openers[name](version) as download:
                if download is not None:
                    put(copies.keep(name, download))
                elif known is not None:
                    put(known)

        # Ctrl-C ends the threads where they are; what has come whole is kept.
        with closing(run_ahead(copy, list(openers), _AT_ONCE, 2 * len(openers))) as events:
            for name, event in events:
                if isinstance(event, Copy):
                    found[name] = event
                    continue
                done += 1
                if event.error is not None:
                    _fail(name, event.error, report)
                if progress is not None:
                    seconds = time.monotonic() - started
                    n_failed = len(report.errors)
                    progress(Progress(done, len(openers), 0, n_failed, name, seconds))
    fetched.copies = {name: found[name] for name in openers if name in found}
    return fetched


def list_folders(sources: Sequence[str | Path]) -> list[Listing]:
    """What is in the folders among the sources that URLs name; a web server lists none.

    Raises:
        ReadError: If one cannot be listed.
    """
    urls = [str(source) for source in sources if is_url(source)]
    named = [(clean_url(url), url) for url in urls]
    return [list_files(name, url) for name, url in named if not _is_web(name)]


def clean_url(url: str) -> str:
    """The name of what a URL stands for: without its fragment, user and password.

    Raises:
        ReadError: If it is none that can be fetched.
    """
    try:
        parts = urlsplit(url)
        url.encode()
    except ValueError as error:  # UnicodeEncodeError is one
        raise ReadError(f"it is no URL that can be used ({error})", file=ascii(url)) from error
    if parts.scheme in ("file", "local"):
        raise ReadError("files of this machine are given by their path", file=url)
    # A password must not end up in a collection and in its citations.
    if _is_web(url):
        host = parts.netloc.rpartition("@")[2].lower()
        return urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))
    name = re.sub(r"(?<=://)[^/@]*@", "", url)
    # Its redirects would not be checked.
    if any(map(_is_web, url.split("::"))):
        raise ReadError("download the archive, and give its path after the ::", file=name)
    return name


def _is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def drop_unread(copies: Copies, fetched: Fetched, report: IngestReport) -> None:
    """Delete the copies that could not be read, since nothing refers to them."""
    failed, found = set(report.failed), fetched.copies
    read = {copy.sha256 for name, copy in found.items() if name not in failed}
    for name, copy in found.items():
        if name in failed and copy.sha256 not in read:
            copies.drop(copy)


def _openers(
    sources: Sequence[str | Path], client: httpx.Client, fetched: Fetched, report: IngestReport
) -> dict[str, Opener]:
    """Name to how it is opened, of every file that the URLs among the sources name."""
    from mmrag.ingest.web import open_url

    openers: dict[str, Opener] = {}
    for url in (str(source) for source in sources if is_url(source)):
        try:
            name = clean_url(url)
            if _is_web(name):
                openers[name] = partial(open_url, client, name, url)
                continue
            listing = list_files(name, url)
        except ReadError as error:
            _fail(error.file, error, report)
            continue
        fetched.listings.append(listing)
        fetched.passed_over += listing.passed_over
        for each, stored in listing.files.items():
            openers[each] = partial(open_stored, stored, each)
    return openers


def _fail(name: str, error: Exception, report: IngestReport) -> None:
    """Report what is wrong with one source; raise what is wrong with the program."""
    if is_environment_error(error):  # such as a full disk
        error = ReadError(f"its copy cannot be stored ({error})", file=name, retry=True)
    if not isinstance(error, ReadError):
        raise error
    report.errors.append(error)
    report.failed.append(name)
