"""A progress bar on stderr, shown only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Give a function that counts items done; it does nothing where no bar is shown."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda done: bar.advance(task, done)
