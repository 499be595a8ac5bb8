"""What indexing reports while it runs and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrag.errors import ReadError

OPTIMIZING = "building the search index; stopping now loses nothing"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    pages: embedded and stored in this run. failures: errors so far. file: the latest one.
    seconds: since the start. pages_left: about how many are still to come, by the bytes of the
    files; None until the first file is done. optimizing: every file is stored, and the search
    indexes are being built.

    Examples:
        >>> now = Progress(1, 4, pages=30, failures=0, file="a.pdf", seconds=10.0, pages_left=90)
        >>> now.pages_per_second, now.seconds_left
        (3.0, 30.0)
    """

    files_done: int
    files_total: int
    pages: int
    failures: int
    file: str
    seconds: float
    pages_left: int | None = None
    optimizing: bool = False

    @property
    def pages_per_second(self) -> float:
        """Pages stored per second since the start."""
        return self.pages / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """About how long it goes on at this rate; None where that is not known yet."""
        if self.pages_left is None or not self.pages:
            return None
        return self.pages_left / self.pages_per_second


@dataclass
class DescriptionReport:
    """What describing images took.

    stored: descriptions stored. reused: of them, those that an earlier call had paid for.
    calls: requests to the model, repeated ones too. failed: images without a description.
    left: images that were not asked about, after failures in a row.
    input_tokens, output_tokens: as the server counts them; None if it does not say.

    Examples:
        >>> report = DescriptionReport("my-model", calls=1)
        >>> report.count_tokens((900, 120))
        >>> report.input_tokens, report.output_tokens
        (900, 120)
    """

    model: str
    stored: int = 0
    reused: int = 0
    calls: int = 0
    failed: int = 0
    left: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 0.0

    def count_tokens(self, used: tuple[int, int] | None) -> None:
        """Add the tokens in and out of one call; None if the server does not say."""
        if used is not None:
            self.input_tokens = (self.input_tokens or 0) + used[0]
            self.output_tokens = (self.output_tokens or 0) + used[1]


def error_row(error: ReadError) -> dict[str, Any]:
    """A failure for JSON."""
    return {"file": error.file, "page": error.page, "error": str(error.args[0])}


@dataclass
class IngestReport:
    """What became of every file, by path.

    indexed: new files.
    replaced: files whose content had changed.
    incomplete: files of which pages were lost to time, memory or a full disk. What could be read
        is stored, and the next run reads the file again.
    unchanged: files that are indexed already.
    removed: files forgotten because they are gone.
    failed: files of which nothing could be read, or whose reading was cut short.
    passed_over: files of types that are not read.
    moved: new path to old one.
    duplicates: path to the indexed file of equal content that stands for it.
    errors: what could not be read or embedded in this run, file by file.
    known_errors: what an earlier run could not read of the unchanged files.
    notes: what else should be known.
    pages, nodes: stored in this run.
    descriptions: what describing images took; None if it was not asked for.

    Examples:
        >>> report = IngestReport(indexed=["a.pdf"], pages=2)
        >>> f"{len(report.indexed)} file, {report.pages} pages"
        '1 file, 2 pages'
    """

    indexed: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    errors: list[ReadError] = field(default_factory=list)
    known_errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pages: int = 0
    nodes: int = 0
    seconds: float = 0.0
    descriptions: DescriptionReport | None = None


@contextmanager
def shown_progress(
    progress: bool | Callable[[Progress], None],
) -> Iterator[Callable[[Progress], None] | None]:
    """The progress function to call; for True, one that moves a bar on stderr."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    # Here: rich is only needed by those who ask for a bar.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files, {task.description}"))
    # On stderr, so that the output of a script stays clean.
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def show(now: Progress) -> None:
            speed = f"{now.pages} pages ({now.pages_per_second:.1f}/s)"
            failures = f", {now.failures} failures" if now.failures else ""
            latest = OPTIMIZING if now.optimizing else Path(now.file).name
            bar.update(
                task,
                total=now.files_total,
                completed=now.files_done,
                description=f"{speed}{failures}: {latest}",
            )

        yield show
