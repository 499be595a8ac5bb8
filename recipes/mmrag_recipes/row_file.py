"""Files of any number of rows: each row is read when it is asked for, from its place in the file.

What planning needs of all rows, their keys and places, is read once, by all cores, and kept in
arrays beside the file (``rows.jsonl.index``), which processes of one machine share. The index is
made again when the file changes.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mmrag.errors import ContentError
from mmrag.processes import usable_cores
from mmrag_recipes.console import track
from mmrag_recipes.rows import Item, Row, first_problem, images_of

logger = logging.getLogger("mmrag_recipes")

Array = NDArray[np.int64]

_RANGE = 4_000_000  # bytes of a file that one task reads
_FEW_TASKS = 4  # with so few, starting processes takes longer than they save
_SHOWN_PROBLEMS = 20
_FORMAT = 1  # of the index; raise it when the arrays change


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths in one array: list i is values[ends[i - 1] : ends[i]]."""

    values: Array
    ends: Array

    def __getitem__(self, index: int) -> Array:
        return self.values[self.ends[index - 1] if index else 0 : self.ends[index]]

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        """Pack lists."""
        kept = list(lists)
        ends = np.cumsum([len(one) for one in kept], dtype=np.int64)
        return cls(np.array([value for one in kept for value in one], dtype=np.int64), ends)


@dataclass(frozen=True)
class Keys:
    """What tells n rows apart, as 63-bit hashes.

    queries: (n,) content of each query. places: (n,) page that each source names, 0 for none.
    positives, negatives: contents of each row's documents.
    """

    queries: Array
    places: Array
    positives: Ragged
    negatives: Ragged

    def __len__(self) -> int:
        return len(self.queries)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Keys:
        """Keys of rows, each of which is looked at once."""
        queries: list[int] = []
        places: list[int] = []
        positives: list[list[int]] = []
        negatives: list[list[int]] = []
        for row in rows:
            queries.append(row.query.key)
            place = row.place
            places.append(_hash(place) if place else 0)
            positives.append([item.key for item in row.positives])
            negatives.append([item.key for item in row.negatives])
        return cls(
            np.array(queries, dtype=np.int64),
            np.array(places, dtype=np.int64),
            Ragged.of(positives),
            Ragged.of(negatives),
        )


class RowFile(Sequence[Row]):
    """Rows of a file by number; safe to read from several threads.

    folder: of the index. digest: SHA-256 of the file. keys: of all rows.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.digest: str = meta["digest"]
        self._offsets = self._array("offsets")
        self.keys = Keys(
            self._array("queries"),
            self._array("places"),
            Ragged(self._array("positives"), self._array("positive_ends")),
            Ragged(self._array("negatives"), self._array("negative_ends")),
        )
        with path.open("rb") as file:
            # Threads read at any place without a shared position; pages are the system's to keep.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def images(self) -> list[str]:
        """Ids of all images of the rows, sorted."""
        return (self.folder / "images.txt").read_text(encoding="utf-8").split("\n")[:-1]

    def _array(self, name: str) -> Array:
        # An empty array cannot be mapped.
        array: Array = np.load(self.folder / f"{name}.npy", mmap_mode=None)
        return array if len(array) == 0 else np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self._offsets[index])
        end = self._bytes.find(b"\n", start)
        return Row.model_validate_json(self._bytes[start : end if end >= 0 else None])


class Documents:
    """The documents of a file of rows by their keys, each read from the first row that has it."""

    def __init__(self, rows: RowFile) -> None:
        self._rows = rows
        self._sides = rows.keys.positives, rows.keys.negatives
        every = np.concatenate([side.values for side in self._sides])
        self._keys, self._first = np.unique(every, return_index=True)

    def __getitem__(self, key: int) -> Item:
        place = int(self._first[np.searchsorted(self._keys, key)])
        positives, negatives = self._sides
        of_positives = place < len(positives.values)
        side = positives if of_positives else negatives
        place -= 0 if of_positives else len(positives.values)
        index = int(np.searchsorted(side.ends, place, side="right"))
        row: Row = self._rows[index]
        items = row.positives if of_positives else row.negatives
        return items[place - (int(side.ends[index - 1]) if index else 0)]


def open_rows(path: str | Path) -> RowFile:
    """Open a file of rows; its index is made if there is none that fits.

    Raises:
        ContentError: That names every bad line, or if there are no rows.
    """
    file = Path(path)
    try:
        state = file.stat()
    except OSError as error:
        raise ContentError(f"{file}: the rows cannot be read ({error}).") from error
    stamp = [_FORMAT, state.st_size, state.st_mtime_ns]
    index = file.with_name(file.name + ".index")
    if _stamp_of(index) != stamp:
        index = _make_index(file, index, stamp)
    return RowFile(file, index)


def _stamp_of(index: Path) -> Any:
    try:
        return json.loads((index / "meta.json").read_text(encoding="utf-8"))["stamp"]
    except (OSError, ValueError, KeyError):
        return None


def _make_index(path: Path, index: Path, stamp: list[int]) -> Path:
    """Read every row once and write the arrays. Returns their folder."""
    starts = range(0, stamp[1], _RANGE)
    parts = []
    with workers(len(starts)) as pool:
        stops = [start + _RANGE for start in starts]
        mapped = pool.map(_read_range, [path] * len(starts), starts, stops)
        parts = list(track(mapped, len(starts), f"reading {path.name}"))
    _raise_problems(path, parts)
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays
    }
    for kind in ("positive", "negative"):
        arrays[f"{kind}_ends"] = np.cumsum(arrays.pop(f"{kind}_counts"))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    images = sorted(set().union(*(part.images for part in parts)))
    try:
        index.mkdir(exist_ok=True)
    except OSError as error:
        logger.warning("%s: the index cannot be kept beside the rows (%s).", path, error)
        # Data may lie on a disk that is read-only.
        index = Path(tempfile.mkdtemp(prefix="mmrag-index-"))
    for name, array in arrays.items():
        save_array(index / f"{name}.npy", array)
    write_whole(index / "images.txt", "".join(f"{name}\n" for name in images).encode())
    # Written last, so that an index cut short is no index.
    write_whole(index / "meta.json", json.dumps({"stamp": stamp, "digest": digest}).encode())
    return index


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``.npy``, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: one process may read what another writes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


@dataclass
class _Part:
    """What was read of a range: arrays, bad lines (line within the range, message), lines."""

    arrays: dict[str, Array] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    id_lines: list[int] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    n_lines: int = 0
    images: set[str] = field(default_factory=set)


def _read_range(path: Path, start: int, stop: int) -> _Part:
    """Rows of all lines that begin in a range of the file."""
    part = _Part()
    offsets: list[int] = []

    def rows() -> Iterator[Row]:
        # One at a time: the garbage collector goes through all rows that are in memory.
        for offset, line in _lines_between(path, start, stop):
            part.n_lines += 1
            if not line.strip():
                continue
            try:
                row = Row.model_validate_json(line)
            except ValidationError as error:
                part.problems.append((part.n_lines, first_problem(error)))
                continue
            offsets.append(offset)
            part.ids.append(row.id)
            part.id_lines.append(part.n_lines)
            part.images |= images_of([row])
            yield row

    keys = Keys.of(rows())
    part.arrays = {
        "offsets": np.array(offsets, dtype=np.int64),
        "queries": keys.queries,
        "places": keys.places,
        "positives": keys.positives.values,
        "positive_counts": np.diff(keys.positives.ends, prepend=0),
        "negatives": keys.negatives.values,
        "negative_counts": np.diff(keys.negatives.ends, prepend=0),
    }
    return part


def _lines_between(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that begins in a range of the file."""
    with path.open("rb") as file:
        # One byte earlier: if that is a line end, the range begins with a whole line.
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # its line began in the range before
        elif file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while (offset := file.tell()) < stop and (line := file.readline()):
            yield offset, line


def _raise_problems(path: Path, parts: Sequence[_Part]) -> None:
    """Raise ContentError for bad lines, ids that come twice, and a file without rows."""
    problems = []
    seen: dict[str, int] = {}
    before = 0
    for part in parts:
        problems += [f"{path}:{before + line}: {message}" for line, message in part.problems]
        for name, line in zip(part.ids, part.id_lines, strict=True):
            first = seen.setdefault(name, before + line)
            if first != before + line:
                problems.append(f"{path}:{before + line}: id {name!r} is in line {first} already")
        before += part.n_lines
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise ContentError("\n".join(shown))
    if not seen:
        raise ContentError(f"{path}: there are no rows.")


def _hash(text: str) -> int:
    # 63 bits, which fit into int64. Python's own hash differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class _Here(Executor):
    """Runs tasks in this process, one after the other."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


@contextmanager
def workers(
    n_tasks: int, setup: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[Executor]:
    """Processes on all cores for many tasks, none for few; ``setup`` runs once in each."""
    if n_tasks <= _FEW_TASKS or usable_cores() == 1:
        if setup:
            setup(*arguments)
        yield _Here()
        return
    # Not forked: this process may run threads, and hold a GPU.
    context = get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), context, setup, arguments) as pool:
        yield pool
