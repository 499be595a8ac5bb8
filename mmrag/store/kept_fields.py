"""Fields of payloads that are kept in memory from one search to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MOST_POINTS = 100_000
"""Points of which fields are kept, at most; each takes about half a kilobyte."""


class KeptFields:
    """A few fields of many points, each read from the store once.

    Reading the payloads of the hundred points of a ranking takes several times as long as finding
    them. After a write to the store a new object is needed.

    Args:
        read: gives the id and the fields of those of the points that exist.
        most: points that are kept.

    Examples:
        >>> stored = {"a": {"page": 1}, "b": {"page": 2}}
        >>> kept = KeptFields(lambda ids: [(id_, stored[id_]) for id_ in ids])
        >>> kept.of(["a", "b"]), len(kept)
        ({'a': {'page': 1}, 'b': {'page': 2}}, 2)
    """

    def __init__(
        self,
        read: Callable[[list[str]], Iterable[tuple[str, Mapping[str, Any]]]],
        most: int = MOST_POINTS,
    ) -> None:
        self._read = read
        self._most = most
        self._kept: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The fields of those of the points that exist, by id; not to be changed."""
        # One dict throughout: another thread may start a new one meanwhile.
        kept = self._kept
        found = {id_: fields for id_ in ids if (fields := kept.get(id_)) is not None}
        if missing := [id_ for id_ in ids if id_ not in found]:
            new = {id_: _compact(fields) for id_, fields in self._read(missing)}
            found |= new
            if len(kept) + len(new) > self._most:
                kept = self._kept = {}
            kept.update(list(new.items())[: self._most])
        return found


def _compact(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Hash, file and kind are those of many points: one string serves all of them.
    return {key: sys.intern(each) if type(each) is str else each for key, each in fields.items()}
