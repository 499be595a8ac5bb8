"""Uploaded files: checked, stored under a safe name, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import unicodedata
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mmrag.errors import ContentError, ReadError
from mmrag.reading import count_pages, file_sha256
from mmrag.reading.files import suffixes
from mmrag.server.errors import ApiError

_LONGEST_NAME = 180  # bytes; file systems take 255
_naming = threading.Lock()


def safe_name(name: str) -> str:
    """A file name that stays in its folder: no path, no control or leading characters that hide.

    Raises:
        ApiError: 415 for a kind of file that is not read.
        ContentError: For no name at all.
    """
    # NFC, so that one name is one file: macOS sends accents as separate characters.
    last = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).name
    kept = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip().lstrip(".")
    stem, suffix = PurePosixPath(kept).stem, PurePosixPath(kept).suffix
    if not stem:
        raise ContentError("The file has no name; send one, with its suffix.")
    if suffix.lower() not in suffixes():
        known = ", ".join(sorted(suffixes()))
        raise ApiError(415, f"{kept}: unsupported file type; send one of {known}.", "file_kind")
    room = _LONGEST_NAME - len(suffix.encode())
    # The limit is in bytes, and may fall within a character.
    return stem.encode()[:room].decode(errors="ignore") + suffix


def store_upload(stream: BinaryIO, name: str, folder: Path, max_bytes: int, max_pages: int) -> Path:
    """Write an uploaded file into ``folder``; it appears there when it is complete.

    A file of that name with other content is kept, and the new one numbered: ``a (2).pdf``.

    Raises:
        ApiError: 413 for a file that is too large, 415 for another kind of file.
        ReadError: For a PDF that cannot be opened.
    """
    name = safe_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    # Hidden names are passed over by indexing, should the server be killed here.
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as incoming:
        part = Path(incoming) / name
        with part.open("wb") as file:
            _copy(stream, file, name, max_bytes)
            file.flush()
            # Once it is answered for, a file must outlive a loss of power.
            os.fsync(file.fileno())
        if part.suffix.lower() == ".pdf" and (pages := _count_pages(part)) > max_pages:
            raise ApiError(
                413, f"{name} has {pages} pages; at most {max_pages} are taken.", "too_many_pages"
            )
        # Two uploads of one name at once would find the same name free.
        with _naming:
            target = _free_name(folder / name, file_sha256(part))
            part.replace(target)
    return target


def clean_incoming(folder: Path) -> None:
    """Delete what a server that was killed left of uploads."""
    for rest in folder.glob(".incoming-*"):
        shutil.rmtree(rest, ignore_errors=True)


def _count_pages(part: Path) -> int:
    try:
        return count_pages(part)
    except ReadError as error:
        # It names a folder that is gone by now; people know the file by its name.
        raise ReadError(error.args[0], file=part.name, retry=error.retry) from error


def _copy(stream: BinaryIO, file: BinaryIO, name: str, max_bytes: int) -> None:
    size = 0
    while block := stream.read(1024 * 1024):
        size += len(block)
        if size > max_bytes:
            limit = max_bytes // (1024 * 1024)
            raise ApiError(413, f"{name} is larger than {limit} MiB.", "file_too_large")
        file.write(block)
    if size == 0:
        raise ContentError(f"{name} is empty.")


def _free_name(target: Path, sha256: str) -> Path:
    """The target, or its first numbered variant that is free or has the same content."""
    candidate, number = target, 2
    while candidate.exists() and file_sha256(candidate) != sha256:
        candidate = target.with_name(f"{target.stem} ({number}){target.suffix}")
        number += 1
    return candidate
