"""Metadata that a user gives for files: for all of a run, by a function, or in sidecar files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias

from mmrag.errors import ConfigError, ReadError
from mmrag.nodes import RESERVED_KEYS

FileMetadata: TypeAlias = Mapping[str, Any] | Callable[[Path], Mapping[str, Any] | None]

SIDECAR = ".meta.json"
"""``report.pdf.meta.json`` holds the metadata of ``report.pdf``, as one JSON object."""


def metadata_of(path: Path, given: FileMetadata | None) -> dict[str, Any] | None:
    """The metadata of a file: its sidecar's, and over it what is given; None without either.

    Raises:
        ConfigError: For what is given and is not JSON, or uses a key of mmrag's own.
        ReadError: For such a sidecar; it names it.
    """
    sidecar = path.with_name(f"{path.name}{SIDECAR}")
    found: dict[str, Any] | None = None
    try:
        found = _checked(json.loads(sidecar.read_bytes()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, ConfigError) as error:
        raise ReadError(f"the metadata cannot be used: {error}", file=sidecar.as_posix()) from error
    own = given(path) if callable(given) else given
    if own is None:
        return found
    return (found or {}) | _checked(own)


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
