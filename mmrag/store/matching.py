"""From ``Where`` to a filter of the engine."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmrag.errors import ConfigError
from mmrag.queries import Where
from mmrag.store.engine import AnyOf, Condition, Filter, Within
from mmrag.store.filters import any_of, translated


def matching_paths(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths and URLs that end in a pattern, or match it as a glob: ``x/a.pdf``, ``x/*``."""
    return [path for path in paths if any(_matches(path, pattern) for pattern in patterns)]


def _matches(path: str, pattern: str) -> bool:
    # macOS writes file names decomposed (NFD); a keyboard gives them composed (NFC).
    path = unicodedata.normalize("NFC", path)
    wanted = PurePosixPath(unicodedata.normalize("NFC", pattern)).as_posix()
    # An empty pattern would match every file.
    if wanted == ".":
        return False
    # A URL has two slashes where a path has one, and may hold signs that a glob reads otherwise.
    if path == pattern:
        return True
    # By whole parts of the path: "port.pdf" is not "report.pdf".
    return f"/{path}".endswith(f"/{wanted}") or PurePosixPath(path).match(wanted)


def as_filter(where: Where, paths: Callable[[], Sequence[str]]) -> Filter:
    """The filter for ``where``; ``paths`` gives the stored paths, if they are needed.

    Raises:
        ConfigError: For values that cannot be matched.
    """

    def matching(patterns: Sequence[str]) -> list[str]:
        return matching_paths(patterns, paths())

    must: list[Condition] = []
    if where.files:
        must.append(AnyOf("file", tuple(matching(where.files))))
    if where.pages is not None:
        first, last = where.pages
        must.append(Within("page", gte=first, lte=last))
    if where.kinds:
        must.append(AnyOf("kind", tuple(where.kinds)))
    must += [any_of(key, _values(key, value)) for key, value in where.metadata.items()]
    if where.filters is not None:
        must.append(translated(where.filters, matching))
    return Filter(must=tuple(must))


def _values(key: str, value: Any) -> tuple[str | int | float | bool, ...]:
    many = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not many or not all(isinstance(each, (str, int, float)) for each in many):
        raise ConfigError(
            f"Where.metadata[{key!r}] = {value!r}: give a str, int, float or bool, or a list of "
            "them that is not empty."
        )
    return tuple(many)
