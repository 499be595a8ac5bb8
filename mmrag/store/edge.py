"""The engine in this process: qdrant-edge, one shard in a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge
from numpy.typing import NDArray
from typing_extensions import override

from mmrag.errors import CollectionError
from mmrag.store.engine import (
    FACET_LIMIT,
    SCROLL_PAGE,
    TERMS_FIELD,
    Engine,
    Filter,
    Point,
    Schema,
    Scored,
    as_point,
    translate,
)

# The write-ahead log keeps every write from a killed process; flushing keeps the log short.
_FLUSH_POINTS = 2000


@contextmanager
def _edge_errors(doing: str) -> Iterator[None]:
    """Say which action failed: qdrant-edge raises plain Exception for everything."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise
        if "WouldBlock" in str(error):
            raise CollectionError(
                f"{doing}: the collection is in use by another process, or was opened twice in "
                "this one. Close it there, or put it on a Qdrant server that all can share."
            ) from error
        raise CollectionError(f"{doing}: {error}") from error


class EdgeEngine(Engine):
    """qdrant-edge: one shard in a folder, used by one process at a time.

    It holds the GIL while it works; ``optimize`` may take seconds.
    """

    def __init__(self, folder: Path) -> None:
        """Open an existing shard. Raises CollectionError if it is locked or broken."""
        self._folder = folder
        self._unflushed = 0
        with self._errors("open"):
            self._shard: edge.EdgeShard | None = edge.EdgeShard.load(str(folder))

    @classmethod
    def create(cls, folder: Path, schema: Schema) -> EdgeEngine:
        """Create a shard with its indexes. It appears under its name only when complete.

        One that another process has completed meanwhile is opened instead.
        """
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        config = edge.EdgeConfig(
            vectors={
                name: edge.EdgeVectorParams(size=dim, distance=edge.Distance.Cosine)
                for name, dim in schema.vectors.items()
            }
        )
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _edge_errors(f"cannot create {folder}"):
                shard = edge.EdgeShard.create(str(unfinished), config)
                _create_indexes(shard, schema)
                shard.flush()
                shard.close()
            unfinished.rename(folder)
        except (OSError, CollectionError):
            if not folder.is_dir():
                raise
        engine = cls(folder)
        for rest in folder.parent.glob(f"{folder.name}.*new"):
            shutil.rmtree(rest, ignore_errors=True)
        return engine

    @override
    def upsert(self, points: Sequence[Point]) -> None:
        rows = [
            edge.Point(
                point.id,
                {name: vector.tolist() for name, vector in point.vectors.items()},
                point.payload,
            )
            for point in points
        ]
        with self._errors("write to"):
            self._open.update(edge.UpdateOperation.upsert_points(rows))
        self._unflushed += len(rows)
        if self._unflushed >= _FLUSH_POINTS:
            self.flush()

    @override
    def delete(self, where: Filter) -> None:
        operation = edge.UpdateOperation.delete_points_by_filter(self._filter(where))
        with self._errors("delete from"):
            self._open.update(operation)

    @override
    def retrieve(self, ids: Sequence[str], payload: bool = True) -> list[Point]:
        with self._errors("read from"):
            records = self._open.retrieve(list(ids), payload, False)
        return [as_point(record) for record in records]

    @override
    def nearest(
        self, name: str, vector: NDArray[np.float32], limit: int, where: Filter
    ) -> list[Scored]:
        return self._query(edge.Query.Nearest(vector.tolist(), using=name), limit, where)

    @override
    def bm25(self, terms: str, limit: int, where: Filter) -> list[Scored]:
        return self._query(edge.TextQuery(TERMS_FIELD, terms), limit, where)

    @override
    def scroll(self, where: Filter, vectors: bool = False) -> Iterator[Point]:
        offset, condition = None, self._filter(where)
        while True:
            request = edge.ScrollRequest(
                offset=offset,
                limit=SCROLL_PAGE,
                filter=condition,
                with_payload=True,
                with_vector=vectors,
            )
            with self._errors("read from"):
                records, offset = self._open.scroll(request)
            yield from (as_point(record) for record in records)
            if offset is None:
                return

    @override
    def count(self, where: Filter) -> int:
        with self._errors("count in"):
            return int(self._open.count(edge.CountRequest(exact=True, filter=self._filter(where))))

    @override
    def create_indexes(self, schema: Schema) -> None:
        with self._errors("index"):
            _create_indexes(self._open, schema)

    @override
    def drop_index(self, key: str) -> None:
        with self._errors("index"):
            self._open.update(edge.UpdateOperation.delete_field_index(key))

    @override
    def facet(self, key: str) -> dict[str, int]:
        with self._errors("count in"):
            found = self._open.facet(edge.FacetRequest(key=key, limit=FACET_LIMIT, exact=True))
        # An index goes on listing values whose points are gone.
        return {str(hit.value): hit.count for hit in found.hits if hit.count}

    @override
    def flush(self) -> None:
        with self._errors("flush"):
            self._open.flush()
        self._unflushed = 0

    @override
    def optimize(self) -> None:
        with self._errors("optimise"):
            self._open.optimize()
        self.flush()

    @override
    def close(self) -> None:
        if self._shard is not None:
            with self._errors("close"):
                self._shard.close()
            self._shard = None

    @property
    def _open(self) -> edge.EdgeShard:
        if self._shard is None:
            raise CollectionError(f"The collection {self._folder} is closed; open it again.")
        return self._shard

    def _query(self, query: Any, limit: int, where: Filter) -> list[Scored]:
        request = edge.QueryRequest(
            limit=limit,
            query=query,
            filter=self._filter(where),
            with_payload=edge.PayloadSelector.Exclude([TERMS_FIELD]),
        )
        with self._errors("search"):
            found = self._open.query(request)
        return [Scored(str(hit.id), float(hit.score), hit.payload or {}) for hit in found]

    def _filter(self, where: Filter) -> edge.Filter:
        # Python's bool is a subclass of int, and qdrant-edge takes it for a number.
        translated: edge.Filter = translate(where, edge, edge.RangeFloat, np.bool_)
        return translated

    def _errors(self, doing: str) -> AbstractContextManager[None]:
        return _edge_errors(f"cannot {doing} {self._folder}")


def _create_indexes(shard: edge.EdgeShard, schema: Schema) -> None:
    terms = edge.TextIndexParams(
        tokenizer=edge.TokenizerType.Whitespace, lowercase=False, scoring=True
    )
    indexes = (
        {TERMS_FIELD: terms}
        | {name: edge.PayloadSchemaType.Keyword for name in schema.keywords}
        | {name: edge.PayloadSchemaType.Integer for name in schema.integers}
    )
    for name, index in indexes.items():
        shard.update(edge.UpdateOperation.create_field_index(name, index))
