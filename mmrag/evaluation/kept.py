"""What a long run has computed so far, kept in a file, so that it goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fingerprint(*parts: Any) -> str:
    """A hash of JSON values: everything that a result depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Kept:
    """JSON values by fingerprint; with a path, one a line in a file that only grows.

    Examples:
        >>> kept = Kept()
        >>> kept["a fingerprint"] = {"found": []}
        >>> kept.get("a fingerprint")
        {'found': []}
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        # Not splitlines, which also cuts at U+2028 inside of a value.
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
                self._values[row["key"]] = row["value"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut short when the run was stopped

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Only added to: a kill costs the last line at most.
            with self._path.open("a", encoding="utf-8") as file:
                # A line break in front, too: the last line may have been cut short.
                file.write("\n" + json.dumps({"key": key, "value": value}, ensure_ascii=False))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a fingerprint."""
        return self._values.get(key, default)

    def get_or(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of a fingerprint; if there is none, what ``compute`` gives, now kept."""
        if key not in self:
            self[key] = compute()
        return self._values[key]
