"""Files of object stores, other machines and archives, by the file systems of fsspec."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from mmrag.errors import ReadError
from mmrag.ingest.copies import Download
from mmrag.reading.files import not_supported, suffixes

_BLOCK = 1 << 20
# What file systems call the version of a file: S3, Google, Azure, SFTP, FTP, archives and others.
_VERSION = (
    *("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated"),
    *("mtime", "modify", "modificationTime", "last_write_time", "created", "sha", "blob_id"),
    *("CRC", "date_time"),
)


@dataclass(frozen=True)
class Stored:
    """A file of a file system, as its listing has it.

    turn: held while it is read, since some connections take one reader at a time.
    """

    system: Any
    path: str
    size: int | None
    version: Mapping[str, str]
    turn: AbstractContextManager[Any]


@dataclass
class Listing:
    """What a URL of a file or folder stands for.

    folder: start and end of the names below it; None for a single file.
    files: name to file, of the types that are read. passed_over: names of others.
    """

    folder: tuple[str, str] | None
    files: dict[str, Stored] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def lacks(self, name: str) -> bool:
        """Whether a name is one below the folder, and no such file is there."""
        if self.folder is None or name in self.names:
            return False
        start, end = self.folder
        return name.startswith(start) and name.endswith(end)


def list_files(name: str, url: str) -> Listing:
    """The file that a URL names, or the files below the folder, to any depth.

    Hidden files are left out. The listing is asked for anew each time.

    name: the URL without credentials, for names and errors.

    Raises:
        ReadError: If nothing is there, it cannot be listed, or a package is missing.
    """
    from fsspec.core import url_to_fs

    with _told(name):
        # A file system that was made before may remember what it has listed then.
        system, root = url_to_fs(url, skip_instance_cache=True)
        system.invalidate_cache()
        found = system.find(root, detail=True)
    if not found:
        raise ReadError("there is no such file or folder, or it is empty", file=name)
    turn = nullcontext() if getattr(system, "async_impl", False) else threading.Lock()
    if list(found) == [root]:
        if PurePosixPath(root).suffix.lower() not in suffixes():
            raise ReadError(not_supported(PurePosixPath(root)), file=name)
        return Listing(None, {name: _stored(system, root, found[root], turn)})
    start, chain, rest = name.partition("::")
    start, end = start if start.endswith("/") else f"{start}/", chain + rest
    listing = Listing((start, end))
    for path, info in sorted(found.items()):
        below = path.removeprefix(root).lstrip("/")
        each = f"{start}{below}{end}"
        listing.names.add(each)
        if any(part.startswith(".") for part in below.split("/")) or below.endswith(".meta.json"):
            continue
        if PurePosixPath(path).suffix.lower() in suffixes():
            listing.files[each] = _stored(system, path, info, turn)
        else:
            listing.passed_over.append(each)
    return listing


@contextmanager
def open_stored(stored: Stored, name: str, version: Mapping[str, str]) -> Iterator[Download | None]:
    """The content of a file; None if it is still the ``version`` that an earlier call gave.

    Raises:
        ReadError: If it cannot be read.
    """
    if version and version == stored.version:
        yield None
        return
    with stored.turn:
        with _told(name):
            file = stored.system.open(stored.path, "rb")
        try:
            suffix = PurePosixPath(stored.path).suffix.lower()
            yield Download(suffix, _blocks(file, name), stored.size, stored.version)
        finally:
            file.close()


def _stored(
    system: Any, path: str, info: Mapping[str, Any], turn: AbstractContextManager[Any]
) -> Stored:
    # Size alone would miss changes: without anything else a file is fetched each time.
    version = {key: str(info[key]) for key in _VERSION if info.get(key) is not None}
    size = info.get("size")
    return Stored(system, path, size, version and {**version, "size": str(size)}, turn)


def _blocks(file: Any, name: str) -> Iterator[bytes]:
    while True:
        with _told(name):
            block = file.read(_BLOCK)
        if not block:
            return
        yield block


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Make one error of ours of whatever a file system raises."""
    try:
        yield
    except ImportError as error:
        scheme = name.partition("://")[0]
        raise ReadError(f"{scheme}:// needs another package: {error}", file=name) from error
    except FileNotFoundError as error:
        raise ReadError("there is no such file or folder", file=name) from error
    except Exception as error:  # each file system has errors of its own
        first, *_ = str(error).strip().splitlines() or [""]
        message = f"it cannot be read ({type(error).__name__}: {first})"
        raise ReadError(message, file=name, retry=True) from error
