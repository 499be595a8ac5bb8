"""Sources that are not on this machine: fetched when asked, each only if it has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mmrag.errors import ReadError, is_environment_error
from mmrag.ingest.copies import Copies, Copy
from mmrag.ingest.prefetch import run_ahead
from mmrag.ingest.progress import IngestReport, Progress
from mmrag.reading import is_url

# Few: several URLs are most often of one server, which has other visitors.
_AT_ONCE = 4


def fetch(
    sources: Sequence[str | Path],
    copies: Copies,
    report: IngestReport,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Copy]:
    """Copy what the URLs among the sources name, by the names under which they are indexed.

    What cannot be had is in the report, and the rest goes on.
    """
    urls = [str(source) for source in sources if is_url(source)]
    if not urls:
        return {}
    # The client takes a tenth of a second to import.
    from mmrag.ingest.web import new_client, open_url

    copies.clean()
    found: dict[str, Copy] = {}
    named = _named(urls, report)
    started, done = time.monotonic(), 0
    with new_client() as client:

        def copy(name: str, put: Callable[[Copy], None]) -> None:
            known, version = copies.find(name) or (None, {})
            with open_url(client, name, named[name], version) as download:
                if download is not None:
                    put(copies.keep(name, download))
                elif known is not None:
                    put(known)

        # Ctrl-C ends the threads where they are; what has come whole is kept.
        with closing(run_ahead(copy, list(named), _AT_ONCE, len(named))) as events:
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
                    progress(Progress(done, len(named), 0, n_failed, name, seconds))
    return {name: found[name] for name in named if name in found}


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
    if parts.scheme == "file":
        raise ReadError("files of this machine are given by their path", file=url)
    if parts.scheme not in ("http", "https"):
        raise ReadError(f"{parts.scheme}:// is not supported; use http or https", file=url)
    # A password must not end up in a collection and in its citations.
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))


def drop_unread(copies: Copies, found: Mapping[str, Copy], report: IngestReport) -> None:
    """Delete the copies that could not be read, since nothing refers to them."""
    failed = set(report.failed)
    read = {copy.sha256 for name, copy in found.items() if name not in failed}
    for name, copy in found.items():
        if name in failed and copy.sha256 not in read:
            copies.drop(copy)


def _named(urls: Sequence[str], report: IngestReport) -> dict[str, str]:
    """Name to URL as it was given, of those that can be used."""
    named: dict[str, str] = {}
    for url in urls:
        try:
            named.setdefault(clean_url(url), url)
        except ReadError as error:
            _fail(error.file, error, report)
    return named


def _fail(name: str, error: Exception, report: IngestReport) -> None:
    """Report what is wrong with one source; raise what is wrong with the program."""
    if is_environment_error(error):  # such as a full disk
        error = ReadError(f"its copy cannot be stored ({error})", file=name, retry=True)
    if not isinstance(error, ReadError):
        raise error
    report.errors.append(error)
    report.failed.append(name)
