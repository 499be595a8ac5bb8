"""What the commands of the recipes show, and how they end."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrag.errors import MMRagError

logger = logging.getLogger("mmrag_recipes")

T = TypeVar("T")

STOPPED = 130  # exit status after Ctrl-C, as of shells
_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """End with one line instead of a traceback on bad input and on Ctrl-C."""
    try:
        yield
    # Errors of ours say what to do; a traceback would bury that. Anything else is a bug and keeps
    # its own.
    except (MMRagError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        raise SystemExit(STOPPED) from None


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Pass items on and show how far they are: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()
    # Of several processes the first shows its progress: the others go the same way.
    first = os.environ.get("RANK", "0") == "0"
    with Progress(*columns, console=console, disable=not (first and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)
        for done, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            now = time.monotonic()
            if first and not console.is_terminal and now - last > _SECONDS_BETWEEN_LINES:
                last = now
                logger.info("%s: %d of %d", label, done, total)
