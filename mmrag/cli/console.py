"""The terminal: two consoles, JSON, and errors as one line with an exit code."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from mmrag.cli.display import clean
from mmrag.errors import ConfigError, ContentError, MMRagError

NOTHING, USAGE, FAILURE, STOPPED = 1, 2, 3, 130
EXIT_CODES = """\
Exit codes: 0 done; 1 nothing found, or some files could not be read; 2 wrong use;
3 the collection, the model or the server failed; 130 stopped by Ctrl-C.
"""
# Typer draws its errors in boxes 80 columns wide, which would cut a path in two in a pipe.
MARKUP: Literal["rich"] | None = "rich" if sys.stdout.isatty() and sys.stderr.isatty() else None
_PIPE_WIDTH = 100_000  # a pipe has no width: a program that reads it wants whole lines
_STEERING = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def out() -> Console:
    """The console of stdout."""
    return _console(stderr=False)


def err() -> Console:
    """The console of stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # Also with COLUMNS in the environment, which some programs set for all they start.
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def show(*views: RenderableType, stderr: bool = False) -> None:
    """Print views; in a pipe without the spaces that fill the lines of a table."""
    console = _console(stderr=stderr)
    if console.is_terminal:
        console.print(*views, sep="\n")
        return
    with console.capture() as captured:
        console.print(*views, sep="\n")
    lines = (line.rstrip() for line in captured.get().splitlines())
    console.file.write("".join(f"{line}\n" for line in lines))


def say(text: str) -> None:
    """One line on stderr, however long."""
    # As Text: square brackets in names of files are no markup.
    err().print(Text(clean(text)), soft_wrap=True)


def print_json(value: Any) -> None:
    """Indented JSON on stdout; characters that could steer a terminal are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    # Not through rich, which would wrap and colour it.
    sys.stdout.write(_STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


class _Warnings(logging.Handler):
    """Writes each warning once, to the stderr of the moment, which a bar may have replaced."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname}: {record.getMessage()}"
        if line not in self._said:
            self._said.add(line)
            say(line)


@contextmanager
def errors(debug: bool, stopped: str = "Stopped.") -> Iterator[None]:
    """Turn our errors and Ctrl-C into one line and an exit code; show warnings on stderr.

    debug: let errors through, with their traceback. stopped: what is said after Ctrl-C.
    """
    handler = _Warnings()
    logger = logging.getLogger("mmrag")
    logger.addHandler(handler)
    # A handler of the root logger would print each warning a second time.
    logger.propagate = False
    try:
        yield
    except KeyboardInterrupt:
        err().print(f"\n{stopped}")
        raise typer.Exit(STOPPED) from None
    except MMRagError as error:
        if debug:
            raise
        line = Text.assemble(("Error: ", "bold red"), clean(str(error)))
        err().print(line, soft_wrap=True)
        wrong_use = isinstance(error, (ConfigError, ContentError))
        raise typer.Exit(USAGE if wrong_use else FAILURE) from None
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
