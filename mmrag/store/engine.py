"""The protocol of an engine, and what both engines share: points, filters, the schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

TERMS_FIELD = "terms"
LANGUAGE_FIELD = "terms_language"
SCROLL_PAGE = 256
FACET_LIMIT = 1_000_000


@dataclass(frozen=True)
class Point:
    """One stored point: any subset of the named vectors, and a payload.

    vectors: name to (dim,) float32.
    """

    id: str
    payload: dict[str, Any]
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A point found by a search; a higher score is better. Its payload lacks the terms."""

    id: str
    score: float
    payload: dict[str, Any]


@dataclass(frozen=True)
class AnyOf:
    """The payload value at ``key`` equals one of ``values`` (str, int, bool or float)."""

    key: str
    values: tuple[str | int | float | bool, ...]


@dataclass(frozen=True)
class Between:
    """The number at ``key`` lies within the bounds, both included; ``None`` is no bound."""

    key: str
    low: float | None = None
    high: float | None = None


Condition: TypeAlias = AnyOf | Between


@dataclass(frozen=True)
class Filter:
    """Points that meet every condition of ``must`` and none of ``must_not``."""

    must: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Schema:
    """What a collection is created with.

    vectors: name to dimension; distances are cosine.
    The BM25 index over ``terms`` splits at spaces and changes nothing.
    """

    vectors: Mapping[str, int]
    keywords: tuple[str, ...]
    integers: tuple[str, ...]


class Engine(Protocol):
    """A store of points that can be searched by vector and by BM25.

    Every method raises CollectionError if the store refuses, and EndpointError if a server
    cannot be reached.
    """

    def upsert(self, points: Sequence[Point]) -> None:
        """Write points; visible to searches when this returns."""
        ...

    def delete(self, where: Filter) -> None:
        """Delete every point that the filter matches."""
        ...

    def retrieve(self, ids: Sequence[str], payload: bool = True) -> list[Point]:
        """The points with these ids that exist, without vectors, in no particular order."""
        ...

    def nearest(
        self, name: str, vector: NDArray[np.float32], limit: int, where: Filter
    ) -> list[Scored]:
        """The points whose vector ``name`` is nearest by cosine."""
        ...

    def bm25(self, terms: str, limit: int, where: Filter) -> list[Scored]:
        """The points whose ``terms`` rank highest by BM25; ``terms`` are separated by spaces."""
        ...

    def scroll(self, where: Filter, vectors: bool = False) -> Iterator[Point]:
        """Every point that the filter matches, ordered by id."""
        ...

    def count(self, where: Filter) -> int:
        """How many points the filter matches, exactly."""
        ...

    def create_indexes(self, schema: Schema) -> None:
        """Create the payload indexes of ``schema``; those there already are kept."""
        ...

    def drop_index(self, key: str) -> None:
        """Delete the payload index over ``key``; without one, nothing happens."""
        ...

    def facet(self, key: str) -> dict[str, int]:
        """How many points hold each value of an indexed keyword."""
        ...

    def flush(self) -> None:
        """Bring what was written to disk, where this is not the server's business."""
        ...

    def optimize(self) -> None:
        """Build the search indexes now, where a server would do so by itself."""
        ...

    def close(self) -> None:
        """Release the store; closing twice is harmless."""
        ...


def translate(
    where: Filter, library: Any, number_range: Any, truth: Callable[[bool], Any] = bool
) -> Any:
    """The filter in the terms of qdrant-edge or qdrant-client.

    number_range: what ``library`` calls its range of numbers. truth: makes what it takes for a
    truth value.
    """

    def condition(of: Condition) -> Any:
        if isinstance(of, Between):
            return library.FieldCondition(key=of.key, range=number_range(gte=of.low, lte=of.high))
        kinds = {type(value) for value in of.values}
        if kinds <= {str} or kinds <= {int}:
            return library.FieldCondition(key=of.key, match=library.MatchAny(any=list(of.values)))
        return library.Filter(should=[exactly(of.key, value) for value in of.values])

    def exactly(key: str, value: str | int | float | bool) -> Any:
        if isinstance(value, float):
            return library.FieldCondition(key=key, range=number_range(gte=value, lte=value))
        if isinstance(value, bool):
            value = truth(value)
        return library.FieldCondition(key=key, match=library.MatchValue(value=value))

    return library.Filter(
        must=[condition(each) for each in where.must],
        must_not=[condition(each) for each in where.must_not],
    )


def as_point(record: Any) -> Point:
    """A record of either library as a Point."""
    stored = record.vector or {}
    vectors = {name: np.asarray(values, dtype=np.float32) for name, values in stored.items()}
    return Point(str(record.id), record.payload or {}, vectors)
