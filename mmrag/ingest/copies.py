"""Copies of what URLs name, kept beside the page images.

A copy lies in the folder of its content's images and is deleted with them. A note for each URL
says which content it had, and how to ask whether that has changed. A note whose copy is gone is
worth nothing: the collection alone says what is indexed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mmrag.errors import ReadError
from mmrag.reading.files import write
from mmrag.store.images import COPY, NOTES, copy_of

_LEFT_OVER = 86_400  # seconds: older parts are of a run that was killed
_LONGEST = 1_800  # seconds that one file may take


@dataclass(frozen=True)
class Copy:
    """A file that a URL named. path: of the copy. sha256: of its content."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Download:
    """What a URL names, as it begins to come.

    suffix: of its type. size: in bytes, where it is announced. version: by which the next run
        asks whether it has changed; empty if nothing tells.
    """

    suffix: str
    blocks: Iterator[bytes]
    size: int | None = None
    version: Mapping[str, str] = field(default_factory=dict)


class Copies:
    """The copies beside a collection's page images.

    Args:
        images_dir: the folder of the page images.
        max_bytes: larger files are refused.
    """

    def __init__(self, images_dir: Path, max_bytes: int) -> None:
        self._images = images_dir
        self._notes = images_dir / NOTES
        self._max_bytes = max_bytes

    def clean(self) -> None:
        """Delete notes without their copy, and parts that killed runs left."""
        for note in self._notes.glob("*.json"):
            if self._read(note) is None:
                note.unlink(missing_ok=True)
        for part in self._notes.glob(".*.tmp"):
            # Another process may have just completed it.
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < time.time() - _LEFT_OVER:
                    part.unlink()

    def find(self, name: str) -> tuple[Copy, dict[str, str]] | None:
        """The copy of what a URL named last, and its version; None if there is none."""
        return self._read(self._note(name))

    def keep(self, name: str, download: Download) -> Copy:
        """Copy what a URL names.

        Raises:
            ReadError: If it is too large or takes too long.
        """
        if (download.size or 0) > self._max_bytes:
            raise self._too_large(name)
        self._notes.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._notes)
        try:
            with os.fdopen(handle, "wb") as file:
                sha256 = self._copy(name, download.blocks, file)
            path = self._images / sha256[:16] / f"{COPY}{download.suffix}"
            path.parent.mkdir(exist_ok=True)
            # Two types of one content would leave it open which of them is read.
            if (other := copy_of(self._images, sha256)) not in (None, path):
                other.unlink(missing_ok=True)
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)
        note = {"sha256": sha256, "suffix": download.suffix, "version": dict(download.version)}
        write(self._note(name), json.dumps({"url": name} | note).encode())
        return Copy(path, sha256)

    def drop(self, copy: Copy) -> None:
        """Delete a copy that nothing refers to."""
        copy.path.unlink(missing_ok=True)

    def _copy(self, name: str, blocks: Iterator[bytes], file: BinaryIO) -> str:
        """Write the blocks; returns the SHA-256 of them all."""
        digest, size, deadline = hashlib.sha256(), 0, time.monotonic() + _LONGEST
        for block in blocks:
            size += len(block)
            if size > self._max_bytes:
                raise self._too_large(name)
            # A server that sends a byte now and then would otherwise hold the run for ever.
            if time.monotonic() > deadline:
                raise ReadError(
                    f"it did not come within {_LONGEST // 60} minutes; download it yourself and "
                    "index the file",
                    file=name,
                    retry=True,
                )
            digest.update(block)
            file.write(block)
        return digest.hexdigest()

    def _too_large(self, name: str) -> ReadError:
        return ReadError(
            f"it is over the limit of {self._max_bytes:,} bytes; raise max_file_bytes", file=name
        )

    def _note(self, name: str) -> Path:
        return self._notes / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"

    def _read(self, note: Path) -> tuple[Copy, dict[str, str]] | None:
        try:
            values = json.loads(note.read_bytes())
            path = copy_of(self._images, str(values["sha256"]))
            if path is None or path.suffix != values["suffix"]:
                return None
            version = {str(key): str(value) for key, value in values["version"].items()}
            return Copy(path, values["sha256"]), version
        # A note that is cut short or altered costs one download.
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
