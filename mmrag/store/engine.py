"""The protocol of an engine, and what both engines share: points, filters, the schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from mmrag.errors import ConfigError

TERMS_FIELD = "terms"
CHECKSUM_FIELD = "checksum"
Quantization: TypeAlias = Literal["none", "int8", "binary"]
Fields: TypeAlias = bool | Sequence[str]
"""What is read of a payload: all but the terms, nothing, or the fields with these names."""
LANGUAGE_FIELD = "terms_language"
TOKENS = "tokens"
"""The vectors of a node's tokens, many for one node; compared by MaxSim."""
MUVERA = "muvera"
"""Those tokens as one vector; see ``mmrag.embedders.muvera``."""
# points of one request, whose vectors have to fit in memory together
SCROLL_PAGE = 256
# Qdrant lists ten values unless told otherwise.
FACET_LIMIT = 1_000_000

_PLAIN_PATH = re.compile(r"[A-Za-z0-9_-]+(\[\d*\])?(\.[A-Za-z0-9_-]+(\[\d*\])?)*")


@dataclass(frozen=True)
class Point:
    """One stored point: any subset of the named vectors, and a payload.

    vectors: name to (dim,) float32; ``tokens`` is (n, dim).
    checksum: what was stored with it, of a point that was read; see ``mmrag.store.checksums``.
    """

    id: str
    payload: dict[str, Any]
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    checksum: str | None = None


# Not frozen: a question makes hundreds, and a frozen one takes three times as long to make.
@dataclass(slots=True)
class Scored:
    """A point found by a search, with the payload asked for; a higher score is better."""

    id: str
    score: float
    payload: dict[str, Any]


@dataclass(frozen=True)
class Nearest:
    """Asks for the points whose vector ``name`` is nearest by cosine, or inner product.

    vector: (dim,) float32.
    """

    name: str
    vector: NDArray[np.float32]


@dataclass(frozen=True)
class Words:
    """Asks for the points whose ``terms``, separated by spaces, rank highest by BM25."""

    terms: str


@dataclass(frozen=True)
class AnyOf:
    """The payload value at ``key`` equals one of ``values`` (str, int, bool or float)."""

    key: str
    values: tuple[str | int | float | bool, ...]


@dataclass(frozen=True)
class Within:
    """The value at ``key`` lies within bounds: numbers, or ISO dates and times as strings.

    gte, gt, lte, lt: ``None`` is no bound. Numbers compare with numbers only, dates with dates;
    times without a zone are UTC.
    """

    key: str
    gte: float | str | None = None
    lte: float | str | None = None
    gt: float | str | None = None
    lt: float | str | None = None


@dataclass(frozen=True)
class HasText:
    """The string at ``key`` contains ``text``, in the same case.

    words: compare whole words one after the other instead, without case and punctuation.
    """

    key: str
    text: str
    words: bool = False


@dataclass(frozen=True)
class IsEmpty:
    """There is nothing at ``key``, or null, or an empty list."""

    key: str


@dataclass(frozen=True)
class Filter:
    """Points that meet every condition of ``must``, one of ``should`` and none of ``must_not``.

    An empty ``should`` asks for nothing.
    """

    must: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()
    should: tuple[Condition, ...] = ()


Condition: TypeAlias = AnyOf | Within | HasText | IsEmpty | Filter


@dataclass(frozen=True)
class Schema:
    """What a collection is created with.

    vectors: name to dimension; distances are cosine.
    late: name to dimension of ``tokens`` and ``muvera``, kept in half precision. They are compared
        by inner product, tokens by MaxSim, and tokens have no index of their own: they are only
        read for points that were found otherwise.
    The BM25 index over ``terms`` splits at spaces and changes nothing.
    quantization: of ``vectors``, kept in memory beside the vectors on disk.
    """

    vectors: Mapping[str, int]
    keywords: tuple[str, ...]
    integers: tuple[str, ...]
    late: Mapping[str, int] = field(default_factory=dict)
    quantization: Quantization = "none"


def check_quantization(name: str) -> None:
    """Raise ConfigError for a quantization that is not known."""
    if name not in get_args(Quantization):
        raise ConfigError(
            f"quantization={name!r}: give one of {', '.join(get_args(Quantization))}."
        )


def oversampling(quantization: Quantization, limit: int) -> float:
    """How many times ``limit`` nodes a search over codes scores again with whole vectors.

    The codes of int8 confuse neighbours in rank only, so ten nodes more do at any limit: without
    them one in twenty of the ten nearest was lost. Binary codes lost a tenth of them at 2
    (``docs/benchmarks/scale.py``, 100,000 nodes).

    >>> oversampling("int8", 10), oversampling("int8", 100), oversampling("binary", 10)
    (2.0, 1.1, 4.0)
    """
    return {"none": 1.0, "int8": 1 + 10 / limit, "binary": 4.0}[quantization]


class Engine(Protocol):
    """A store of points that can be searched by vector and by BM25.

    Every method raises CollectionError if the store refuses, and EndpointError if a server
    cannot be reached.

    quantization: of the vectors that it stores; a collection sets it.
    """

    quantization: Quantization

    def upsert(self, points: Sequence[Point]) -> None:
        """Write points; visible to searches when this returns."""
        ...

    def delete(self, where: Filter) -> None:
        """Delete every point that the filter matches."""
        ...

    def delete_ids(self, ids: Sequence[str]) -> None:
        """Delete the points with these ids."""
        ...

    def retrieve(self, ids: Sequence[str], payload: bool = True) -> list[Point]:
        """The points with these ids that exist, without vectors, in no particular order."""
        ...

    def rank(
        self,
        queries: Sequence[Nearest | Words],
        limit: int,
        where: Filter,
        payload: Fields = True,
    ) -> list[list[Scored]]:
        """The best points for each of the queries, all asked for at once."""
        ...

    def max_sim(
        self,
        tokens: NDArray[np.float32],
        ids: Sequence[str],
        where: Filter,
        payload: Fields = True,
    ) -> list[Scored]:
        """The MaxSim of (n, dim) tokens with those of the points that have any, best first."""
        ...

    def scroll(self, where: Filter, vectors: bool = False) -> Iterator[Point]:
        """Every point that the filter matches, ordered by id."""
        ...

    def count(self, where: Filter) -> int:
        """How many points the filter matches, exactly."""
        ...

    def count_term(self, term: str) -> int:
        """How many points have this term, by the index of BM25."""
        ...

    def every_point(self) -> Iterator[Point]:
        """Every point with its vectors, read without an index.

        A point that cannot be read comes with its id alone.
        """
        ...

    def read_ahead(self, fields: Sequence[str]) -> Iterator[None]:
        """Keep these fields of points in memory for the searches that ask for them.

        Each step reads a few points. Nothing happens where a server sends what is asked for.
        """
        ...

    def is_intact(self, point: Point) -> bool:
        """Whether a point that was read with its vectors is as it was written.

        A server answers for its own files.
        """
        ...

    @property
    def missing(self) -> int:
        """How many points fewer there are than when the store was last closed.

        Negative for points that came back; 0 where the number is not known.
        """
        ...

    def settle(self) -> None:
        """Take the present number of points for the right one."""
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

    def optimize(self, schema: Schema, tick: Callable[[], None] | None = None) -> None:
        """Build the search indexes now, where a server would do so by itself.

        Nothing happens where few vectors lack one. tick: called twice a second while it goes on;
        an error from it ends the building, and nothing is changed.
        """
        ...

    def close(self) -> None:
        """Release the store; closing twice is harmless."""
        ...


Item = TypeVar("Item")


def in_batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Cut items into lists of ``size``; the last may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


@dataclass(frozen=True)
class Dialect:
    """Writes filters in the terms of qdrant-edge or of qdrant-client.

    library: its module of models. numbers, dates: what it calls its ranges. truth: makes what it
    takes for a truth value.
    """

    library: Any
    numbers: Any
    dates: Any
    truth: Callable[[bool], Any] = bool

    def filter(self, where: Filter) -> Any:
        """The library's filter. Raises ConfigError for a key that Qdrant cannot name."""
        return self.library.Filter(
            must=[self._condition(each) for each in where.must],
            # None, so that neither library has to decide what one of no conditions is.
            should=[self._condition(each) for each in where.should] or None,
            must_not=[self._condition(each) for each in where.must_not],
        )

    def _condition(self, of: Condition) -> Any:
        match of:
            case Filter():
                return self.filter(of)
            case AnyOf():
                return self._any_of(of)
            case Within():
                bounds = {"gte": of.gte, "lte": of.lte, "gt": of.gt, "lt": of.lt}
                # Strings are dates: Qdrant has no range over words.
                dates = any(isinstance(bound, str) for bound in bounds.values())
                return self._field(of.key, range=(self.dates if dates else self.numbers)(**bounds))
            case HasText(words=True):
                return self._field(of.key, match=self.library.MatchPhrase(phrase=of.text))
            case HasText():
                return self._field(of.key, match=self.library.MatchSubstring(substring=of.text))
            case IsEmpty():
                return self._field(of.key, is_empty=True)

    def _any_of(self, of: AnyOf) -> Any:
        kinds = {type(value) for value in of.values}
        # MatchAny takes values of one type; type() and not isinstance, since True is an int.
        if kinds <= {str} or kinds <= {int}:
            return self._field(of.key, match=self.library.MatchAny(any=list(of.values)))
        return self.library.Filter(should=[self._exactly(of.key, value) for value in of.values])

    def _exactly(self, key: str, value: str | int | float | bool) -> Any:
        if isinstance(value, float):
            # Qdrant matches no floats by value: a range of no width does.
            return self._field(key, range=self.numbers(gte=value, lte=value))
        # The two libraries differ in what they call a truth value.
        if isinstance(value, bool):
            value = self.truth(value)
        return self._field(key, match=self.library.MatchValue(value=value))

    def _field(self, key: str, **of: Any) -> Any:
        return self.library.FieldCondition(key=_json_path(key), **of)


def _json_path(key: str) -> str:
    """A metadata key as Qdrant's path: dots lead into nested objects, other marks are quoted."""
    if _PLAIN_PATH.fullmatch(key):
        return key
    if not key or '"' in key:
        raise ConfigError(f"The metadata key {key!r} cannot be filtered; use one without quotes.")
    # Quotes cannot be escaped in Qdrant's paths, so a key that has one cannot be named.
    return f'"{key}"'


def as_point(record: Any) -> Point:
    """A record of either library as a Point."""
    stored = record.vector or {}
    vectors = {name: np.asarray(values, dtype=np.float32) for name, values in stored.items()}
    # None where the payload was not asked for.
    payload = record.payload or {}
    return Point(str(record.id), payload, vectors, payload.pop(CHECKSUM_FIELD, None))
