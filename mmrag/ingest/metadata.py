"""Metadata that a user gives for files: for all of a run, by a function, or in sidecar files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias

from mmrag.errors import ConfigError, ReadError
from mmrag.nodes import RESERVED_KEYS
from mmrag.reading import is_url

# A function is given a Path, or the str of a URL: Any takes functions of the one alone, too.
FileMetadata: TypeAlias = Mapping[str, Any] | Callable[[Any], Mapping[str, Any] | None]

SIDECAR = ".meta.json"
"""``report.pdf.meta.json`` holds the metadata of ``report.pdf``, as one JSON object."""


def metadata_of(name: str, given: FileMetadata | None) -> dict[str, Any] | None:
    """The metadata of a file: its sidecar's, and over it what is given; None without either.

    name: path or URL; only a path has a sidecar.

    Raises:
        ConfigError: For what is given and is not JSON, or uses a key of mmrag's own.
        ReadError: For such a sidecar; it names it.
    """
    source = name if is_url(name) else Path(name)
    found = _of_sidecar(source) if isinstance(source, Path) else None
    own = given(source) if callable(given) else given
    if own is None:
        return found
    return (found or {}) | _checked(own)


def _of_sidecar(path: Path) -> dict[str, Any] | None:
    sidecar = path.with_name(f"{path.name}{SIDECAR}")
    try:
        return _checked(json.loads(sidecar.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise ReadError(f"the metadata cannot be used: {error}", file=sidecar.as_posix()) from error


def _checked(metadata: object) -> dict[str, Any]:
    """A copy in plain JSON; dates become ISO strings. Raises ConfigError."""
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"Metadata is a {type(metadata).__name__}; give a dict.")
    taken = sorted(RESERVED_KEYS & set(metadata))
    if taken:
        raise ConfigError(f"Metadata cannot have the keys {', '.join(taken)}: mmrag sets them.")
    try:
        plain: dict[str, Any] = json.loads(
            json.dumps(metadata if isinstance(metadata, dict) else dict(metadata), default=_iso)
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Metadata must be JSON values or dates: {error}.") from error
    return plain


def _iso(value: object) -> str:
    if isinstance(value, date):  # a datetime is one
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is neither")
