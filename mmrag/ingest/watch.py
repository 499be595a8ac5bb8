"""Watching folders: what has changed in them, as it changes (extra ``watch``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from mmrag.errors import ConfigError
from mmrag.reading.files import IMAGES_MARK, suffixes

INSTALL = "pip install 'mmrag[watch]'"

# Milliseconds without a change after which changes count as complete, and the most to wait for
# that: a large file that is being copied changes all the time.
_QUIET = 500
_LONGEST = 10_000


def require(folders: Sequence[str | Path]) -> None:
    """Raise ConfigError if the extra is missing, or something to watch is no folder."""
    if find_spec("watchfiles") is None:
        raise ConfigError(f"Watching folders needs the watch extra: {INSTALL}")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder} is no folder; only folders can be watched.")


def watch(folders: Sequence[str | Path], stop: threading.Event) -> Iterator[list[Path]]:
    """Files that are new or changed, each time something changes; none if files only went.

    Changes that come shortly after each other are one. Files are named below the folder as it was
    given. Hidden files, files of types that are not read and page images of collections are left
    out.

    Args:
        stop: ends it when it is set.
    """
    from watchfiles import watch as changes_of

    roots = {Path(folder).resolve(): Path(folder) for folder in folders}
    for changes in changes_of(
        *roots, watch_filter=None, step=_QUIET, debounce=_LONGEST, stop_event=stop
    ):
        paths = {Path(path) for _, path in changes}
        named = {_named(path, roots) for path in paths}
        found = sorted(path for path in named if path is not None)
        if found:
            yield [path for path in found if path.is_file()]


def _named(path: Path, roots: dict[Path, Path]) -> Path | None:
    """A changed file as indexing would name it; None if indexing would not find it."""
    root = next((root for root in roots if path.is_relative_to(root)), None)
    if root is None:
        return None
    path = path.with_name(path.name.removesuffix(".meta.json"))  # metadata of the file beside it
    below = path.relative_to(root)
    # A folder that went takes its files along; its suffix says nothing.
    known = path.suffix.lower() in suffixes() or not path.exists()
    hidden = any(part.startswith(".") for part in below.parts)
    images = any((root / parent / IMAGES_MARK).exists() for parent in below.parents)
    return roots[root] / below if known and not hidden and not images else None
