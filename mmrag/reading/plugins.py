"""Readers of other packages, found by entry points; runs in a worker process.

A reader is a function ``read(path, folder, options)`` that yields a ``Passage`` for each piece of
a text, or a ``PageRecord`` for each page, and a ``Problem`` for what it cannot read. ``folder`` is
where images of pages belong. It has the time (``page_seconds`` from one answer to the next) and
memory of any other reader, and may raise: the error is reported with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from mmrag.reading.files import READERS
from mmrag.reading.options import (
    PageRecord,
    Passage,
    Problem,
    ReadOptions,
    Refused,
    Skipped,
    Step,
)


def read_records(
    path: Path, folder: Path, options: ReadOptions, first: int, skipped: Skipped
) -> Iterator[PageRecord | Passage | Problem | Step]:
    """What the reader of a file's suffix gives. Readers name no steps, so none is skipped.

    Raises:
        Refused: If the reader gives something else than records.
    """
    yield Step(None, "open")
    points = entry_points(group=READERS)
    point = next(each for each in points if each.name.lower() == path.suffix.lower())
    folder.mkdir(parents=True, exist_ok=True)
    empty = True
    for record in point.load()(path, folder, options):
        # Checked here, where the message can name the reader; what is sent on has to be pickled.
        if not isinstance(record, (PageRecord, Passage, Problem)):
            raise Refused(
                f"the reader {point.value} gave a {type(record).__name__}; it must give "
                "PageRecord, Passage or Problem"
            )
        empty = False
        yield record
    if empty:  # a file gives pages, errors, or both
        yield Problem(None, f"the reader {point.value} found nothing in it")
