"""What a command shows on stderr while it works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mmrag.cli.console import err, say
from mmrag.cli.display import clean
from mmrag.ingest.progress import OPTIMIZING

if TYPE_CHECKING:
    from rich.status import Status

    from mmrag.ingest.progress import Progress

_LINE_EVERY = 5.0  # seconds between two lines where stderr is a log


class Step:
    """Says what a command waits for: ``step("Loading the embedder")``.

    log: where stderr is no terminal, write each step as a line.
    """

    def __init__(self, console: Console, log: bool) -> None:
        self._log = log and not console.is_terminal
        self._status: Status | None = None
        self._last = 0.0
        if console.is_terminal:
            self._status = console.status("Starting")
            self._status.start()

    def __call__(self, text: str) -> None:
        """Show what comes next."""
        if self._status is not None:
            self._status.update(Text(clean(text)))
        elif self._log:
            say(text)

    def often(self, text: str) -> None:
        """Show a count that changes often; a log gets a line every five seconds."""
        now = time.monotonic()
        if self._status is not None or now - self._last >= _LINE_EVERY:
            self._last = now
            self(text)

    def stop(self) -> None:
        """Clear the line, so that something else can be printed."""
        if self._status is not None:
            self._status.stop()


@contextmanager
def working(*, log: bool = False) -> Iterator[Step]:
    """A spinner on stderr with what the command waits for; in a pipe nothing, or lines (``log``).

    Begin it before the heavy imports: they are a part of the wait.
    """
    step = Step(err(), log)
    try:
        yield step
    finally:
        step.stop()


@contextmanager
def indexing() -> Iterator[Callable[[Progress], None]]:
    """Shows how far a run is: a bar on a terminal, else a line every five seconds."""
    console = err()
    if not console.is_terminal:
        with _lines() as show:
            yield show
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("files \u00b7 {task.description}", markup=False),
        TimeElapsedColumn(),
    )
    # transient: the report that follows says it all.
    with Bar(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(now: Progress) -> None:
            bar.update(
                task, total=now.files_total, completed=now.files_done, description=_speed(now)
            )

        yield show


@contextmanager
def _lines() -> Iterator[Callable[[Progress], None]]:
    """Lines at a steady pace, whether or not the run reports anything in between."""
    started = time.monotonic()
    latest: list[Progress] = []
    done = threading.Event()

    def write() -> None:
        while not done.wait(_LINE_EVERY):
            now = latest[-1] if latest else None
            state = f"{now.files_done}/{now.files_total} files, {_speed(now)}" if now else "Reading"
            say(f"{state} ({time.monotonic() - started:.0f} s)")

    # A thread, since a large PDF may report nothing for minutes.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        # The thread reads only the last state; assigning a slice is atomic.
        yield lambda now: latest.__setitem__(slice(None), [now])
    finally:
        done.set()
        writer.join()


def _speed(now: Progress) -> str:
    failed = f", {now.failures} failed" if now.failures else ""
    name = OPTIMIZING if now.optimizing else clean(Path(now.file).name)
    left = "" if now.seconds_left is None else f", {_duration(now.seconds_left)} left"
    return f"{now.pages} pages ({now.pages_per_second:.1f}/s{left}){failed}: {name}"


def _duration(seconds: float) -> str:
    """``50 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
