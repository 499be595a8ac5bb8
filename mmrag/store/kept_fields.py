"""Fields of payloads that are kept in memory from one search to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from threading import Lock
from typing import Any, TypeAlias
from uuid import UUID

MOST_POINTS = 250_000
"""Points of which fields are kept, at most; each takes about half a kilobyte."""

Kept: TypeAlias = tuple[str, dict[str, Any]]
"""The id of a point, whose text takes longer to write than to look up, and its fields."""


class KeptFields:
    """A few fields of many points, each read from the store once; several threads may use it.

    Reading the payloads of the hundred points of a ranking takes several times as long as finding
    them. Whoever writes to the store calls ``forget`` after the write.

    Args:
        read: gives the number and the fields of those of the points that exist.
        most: points that are kept; those read first are dropped for others.

    Examples:
        >>> stored = {1: {"page": 1}, 2: {"page": 2}}
        >>> kept = KeptFields(lambda ids: [(id_, stored[id_]) for id_ in ids])
        >>> kept.of([2])
        [('00000000-0000-0000-0000-000000000002', {'page': 2})]
        >>> kept.forget(["00000000-0000-0000-0000-000000000002"])
        >>> len(kept)
        0
    """

    def __init__(
        self,
        read: Callable[[list[int]], Iterable[tuple[int, Mapping[str, Any]]]],
        most: int = MOST_POINTS,
    ) -> None:
        self._read = read
        self._most = most
        self._kept: dict[int, Kept] = {}
        # How often points were forgotten: what was read before that may be of before the write.
        self._writes = 0
        self._changing = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def full(self) -> bool:
        """Whether points are dropped for the next ones that are read."""
        return len(self._kept) >= self._most

    def of(self, numbers: Sequence[int]) -> list[Kept | None]:
        """Id and fields, not to be changed, of each point; None for one that does not exist.

        numbers: the ids, which are UUIDs, as numbers.
        """
        # Before anything is read.
        writes = self._writes
        found = list(map(self._kept.get, numbers))
        if missing := [n for n, kept in zip(numbers, found, strict=True) if kept is None]:
            new = {n: (str(UUID(int=n)), _compact(fields)) for n, fields in self._read(missing)}
            found = [kept or new.get(n) for n, kept in zip(numbers, found, strict=True)]
            with self._changing:
                if writes == self._writes:
                    self._keep(new)
        return found

    def forget(self, ids: Iterable[str]) -> None:
        """Read these points anew when they are next asked for."""
        with self._changing:
            self._writes += 1
            for id_ in ids:
                self._kept.pop(UUID(id_).int, None)

    def _keep(self, new: Mapping[int, Kept]) -> None:
        self._kept.update(islice(new.items(), self._most))
        if (excess := len(self._kept) - self._most) > 0:
            # A list first: a dict must not change while it is gone through.
            for number in list(islice(self._kept, excess)):
                del self._kept[number]


def _compact(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Hash, file and kind are those of many points: one string serves all of them.
    return {key: sys.intern(each) if type(each) is str else each for key, each in fields.items()}
