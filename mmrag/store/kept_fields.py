"""Fields of payloads that are kept in memory from one search to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from threading import Lock
from typing import Any
from uuid import UUID

MOST_POINTS = 250_000
"""Points of which fields are kept, at most; each takes about half a kilobyte."""


class KeptFields:
    """A few fields of many points, each read from the store once; several threads may use it.

    Reading the payloads of the hundred points of a ranking takes several times as long as finding
    them. Whoever writes to the store calls ``forget`` after the write.

    Args:
        read: gives the id and the fields of those of the points that exist.
        most: points that are kept; those read first are dropped for others.

    Examples:
        >>> stored = {"a": {"page": 1}, "b": {"page": 2}}
        >>> kept = KeptFields(lambda ids: [(id_, stored[id_]) for id_ in ids])
        >>> kept.of(["a", "b"]), len(kept)
        ({'a': {'page': 1}, 'b': {'page': 2}}, 2)
        >>> kept.forget(["a"])
        >>> len(kept)
        1
    """

    def __init__(
        self,
        read: Callable[[list[str]], Iterable[tuple[str, Mapping[str, Any]]]],
        most: int = MOST_POINTS,
    ) -> None:
        self._read = read
        self._most = most
        self._kept: dict[str, dict[str, Any]] = {}
        # How often points were forgotten: what was read before that may be of before the write.
        self._writes = 0
        self._changing = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def full(self) -> bool:
        """Whether points are dropped for the next ones that are read."""
        return len(self._kept) >= self._most

    def of(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The fields of those of the points that exist, by id; not to be changed."""
        # Before anything is read.
        writes = self._writes
        kept = self._kept.get
        found = {id_: fields for id_ in ids if (fields := kept(id_)) is not None}
        if len(found) < len(ids) and (missing := [id_ for id_ in ids if id_ not in found]):
            new = {id_: _compact(fields) for id_, fields in self._read(missing)}
            found |= new
            with self._changing:
                if writes == self._writes:
                    self._keep(new)
        return found

    def forget(self, ids: Iterable[str]) -> None:
        """Read these points anew when they are next asked for."""
        with self._changing:
            self._writes += 1
            for id_ in ids:
                self._kept.pop(id_, None)

    def _keep(self, new: Mapping[str, dict[str, Any]]) -> None:
        self._kept.update(islice(new.items(), self._most))
        if (excess := len(self._kept) - self._most) > 0:
            # A list first: a dict must not change while it is gone through.
            for id_ in list(islice(self._kept, excess)):
                del self._kept[id_]


class IdTexts(dict[int, str]):
    """The number of a UUID to its text: to write it anew takes longer than to look it up.

    Examples:
        >>> IdTexts()[7]
        '00000000-0000-0000-0000-000000000007'
    """

    def __missing__(self, number: int) -> str:
        # Rather than to keep an order of use: it is hardly ever so many.
        if len(self) >= MOST_POINTS:
            self.clear()
        text = self[number] = str(UUID(int=number))
        return text


def _compact(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Hash, file and kind are those of many points: one string serves all of them.
    return {key: sys.intern(each) if type(each) is str else each for key, each in fields.items()}
