"""Which files are read: finding them, telling their kinds apart, hashing and writing them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, TypeAlias
from uuid import NAMESPACE_URL, uuid5

from mmrag.errors import ReadError
from mmrag.reading.options import ReadOptions

FileKind: TypeAlias = Literal["pdf", "picture", "text", "office", "video", "plugin"]
"""``picture`` for images, as collections store it; ``plugin`` for readers of other packages."""

SUFFIXES: dict[str, FileKind] = {
    ".pdf": "pdf",
    ".png": "picture", ".jpg": "picture", ".jpeg": "picture", ".webp": "picture",
    ".gif": "picture", ".bmp": "picture", ".tif": "picture", ".tiff": "picture",
    ".avif": "picture", ".jp2": "picture", ".j2k": "picture", ".jpx": "picture",
    ".txt": "text", ".text": "text", ".md": "text", ".markdown": "text",
}  # fmt: skip

_MAGIC: tuple[tuple[bytes, str, FileKind | None], ...] = (
    (b"%PDF-", "PDF", "pdf"),
    (b"\x89PNG\r\n\x1a\n", "PNG image", "picture"),
    (b"\xff\xd8\xff", "JPEG image", "picture"),
    (b"GIF8", "GIF image", "picture"),
    (b"II*\0", "TIFF image", "picture"),
    (b"MM\0*", "TIFF image", "picture"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 image", "picture"),
    (b"\xff\x4f\xff\x51", "JPEG 2000 image", "picture"),
    (b"PK\x03\x04", "ZIP archive or Office document", None),
    (b"\xd0\xcf\x11\xe0", "old Office document", None),
    (b"\x1f\x8b", "gzip archive", None),
    (b"\x7fELF", "program", None),
)


READERS = "mmrag.readers"
"""Entry points of this group name a suffix, such as ``.docx``, and the function that reads it."""

OFFICE_SUFFIXES = (
    *(".docx", ".pptx", ".xlsx", ".xls", ".html", ".htm", ".xhtml", ".epub", ".eml", ".msg"),
    ".csv",
)
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# extra: the package that reads its files, and their suffixes
EXTRAS: dict[Literal["office", "video"], tuple[str, tuple[str, ...]]] = {
    "office": ("markitdown", OFFICE_SUFFIXES),
    "video": ("av", VIDEO_SUFFIXES),
}

IMAGES_MARK = ".mmrag"
"""A file of this name says that a folder holds page images, which are not to be read again."""


def suffixes() -> dict[str, FileKind]:
    """Every suffix that is read, in lower case: mmrag's own, and those of installed packages."""
    others: dict[str, FileKind] = {
        point.name.lower(): "plugin" for point in entry_points(group=READERS)
    }
    extras: dict[str, FileKind] = {
        suffix: extra
        for extra, (package, of_extra) in EXTRAS.items()
        if find_spec(package) is not None
        for suffix in of_extra
    }
    return others | extras | SUFFIXES


def missing_extras(wanted: Iterable[str]) -> list[str]:
    """What to install for files of these suffixes that need an extra, a line for each."""
    return [
        f"To read {', '.join(named)}: pip install 'mmrag[{extra}]'"
        for extra, (_, of_extra) in EXTRAS.items()
        if (named := [suffix for suffix in wanted if suffix in of_extra])
    ]


class FoundFiles(NamedTuple):
    """What ``find_files`` found: files to read, what cannot be read, files of other types."""

    files: list[Path]
    errors: list[ReadError]
    passed_over: list[Path]


def find_files(paths: Sequence[str | Path]) -> FoundFiles:
    """Files to read under the paths given, sorted and each once, and what is not read.

    Folders are searched to any depth. Hidden entries and page images of collections in them are
    left out, and files of other types are passed over; for a file that is named itself and cannot
    be read, a ReadError is among what comes back.
    """
    found: dict[Path, None] = {}
    errors: list[ReadError] = []
    passed_over: dict[Path, None] = {}
    known = suffixes()
    for path in map(Path, paths):
        try:
            if path.is_dir():
                for each in _in_folder(path, errors):
                    if each.name.endswith(".meta.json"):  # metadata of the file beside it
                        continue
                    is_read = each.suffix.lower() in known
                    (found if is_read else passed_over)[each] = None
            else:
                # Named on its own, so that passing over it in silence would surprise.
                if not path.exists():
                    raise ReadError("there is no such file or folder", file=path.as_posix())
                if path.suffix.lower() not in known:
                    raise ReadError(not_supported(path), file=path.as_posix())
                found[path] = None
        except OSError as error:  # such as a name that is too long
            errors.append(ReadError(f"it cannot be found ({error.strerror})", file=str(path)))
        except ReadError as error:
            errors.append(error)
    files = []
    for path in sorted(found):
        problem = _why_unusable(path)
        if problem is None:
            files.append(path)
        else:
            name = os.fsencode(path).decode(errors="replace")
            errors.append(ReadError(problem, file=name))
    return FoundFiles(files, errors, sorted(passed_over))


def _why_unusable(path: Path) -> str | None:
    """Why a file can be neither opened nor named, if so."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    with contextlib.suppress(OSError):  # reading it will say so
        if path.is_fifo() or path.is_socket() or path.is_char_device():
            return "it is a pipe or a device; give a regular file"
    return None


def _in_folder(folder: Path, errors: list[ReadError]) -> list[Path]:
    def refuse(error: OSError) -> None:
        name = Path(error.filename or folder).as_posix()
        errors.append(ReadError(f"the folder cannot be read ({error.strerror})", file=name))

    files = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        if IMAGES_MARK in names:
            # os.walk goes into what is left of the list that it gave.
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return files


def is_url(source: str | Path) -> bool:
    """Whether a source is a URL; a Path never is."""
    return isinstance(source, str) and bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source))


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def node_id(sha256: str, page: int | None, kind: str, index: int) -> str:
    """The id of a node: the same for the same bytes, whatever the file is called."""
    return str(uuid5(NAMESPACE_URL, f"{sha256}/{page}/{kind}/{index}"))


def file_kind(path: Path, options: ReadOptions, name: str | None = None) -> FileKind:
    """The kind of a file by its suffix, after a look at its first bytes.

    name: what the file is called in errors; default: its path.

    Raises:
        ReadError: If it is missing, empty, too large, of no known kind, or misnamed.
    """
    name = name or path.as_posix()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise ReadError(f"the file cannot be opened ({error.strerror})", file=name) from error
    suffix = path.suffix.lower()
    kind = SUFFIXES.get(suffix) or suffixes().get(suffix)
    if kind is None:
        raise ReadError(not_supported(path), file=name)
    if size == 0:
        raise ReadError("the file is empty (0 bytes); get it again", file=name)
    if size > options.max_file_bytes:
        raise ReadError(
            f"{size:,} bytes is over the limit of {options.max_file_bytes:,}; split the file or "
            "raise max_file_bytes",
            file=name,
        )
    title, actual = _content(head)
    # Those know their own formats; Office documents, for one, are ZIP files.
    if title is not None and actual != kind and kind not in ("office", "plugin"):
        raise ReadError(
            f"the content is a {title}, not what {path.suffix} says; rename or convert the file",
            file=name,
        )
    return kind


def _content(head: bytes) -> tuple[str | None, FileKind | None]:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP image", "picture"
    if head[4:8] == b"ftyp":  # a container: its brands say of what
        brands = head[8:64]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF image", "picture"
        if brands[:4] in _HEIC_BRANDS:
            return "HEIC image, which is not supported", None
    for magic, title, kind in _MAGIC:
        if head.startswith(magic):
            return title, kind
    return None, None


_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def not_supported(path: PurePath) -> str:
    """Why a file of this suffix is not read, and the extra that would read it."""
    if advice := missing_extras([path.suffix.lower()]):
        return f"files of type {path.suffix} need an extra. {advice[0]}"
    known = " ".join(sorted(suffixes()))
    return f"files of type {path.suffix or '(none)'} are not supported; use {known}"


def write(path: Path, data: bytes) -> None:
    """Write a file that is either there whole or not at all, whenever the program is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    partial.replace(path)


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left half written in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


OnError: TypeAlias = Callable[[ReadError], None]


def raise_it(error: ReadError) -> None:
    """What ``read_file`` does with an error if told nothing else."""
    raise error
