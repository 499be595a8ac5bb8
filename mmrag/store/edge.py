"""The engine in this process: qdrant-edge, one shard in a folder.

qdrant-edge maps its files into memory and trusts them: two processes that create one shard
damage it, a full disk ends the process with SIGBUS, damaged files make it panic, and in a forked
child it waits for threads that are not there. All four are met here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any
from uuid import UUID

import numpy as np
import qdrant_edge as edge
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from typing_extensions import override

from mmrag.errors import CollectionError
from mmrag.store.checksums import as_stored, checksum
from mmrag.store.engine import (
    CHECKSUM_FIELD,
    FACET_LIMIT,
    SCROLL_PAGE,
    TERMS_FIELD,
    TOKENS,
    Dialect,
    Engine,
    Fields,
    Filter,
    Nearest,
    Point,
    Quantization,
    Schema,
    Scored,
    Words,
    as_point,
    oversampling,
)
from mmrag.store.kept_fields import KeptFields
from mmrag.store.optimizing import OLD, WORTH_BYTES, build, copied, recover
from mmrag.store.point_count import PointCount
from mmrag.store.trees import need_space, size_on_disk

# The write-ahead log keeps every write from a killed process; flushing keeps the log short.
_FLUSH_POINTS = 2000
# Points read ahead at once: the 2 ms that this takes are the most a search waits for it.
_AHEAD_PAGE = 100
# A new shard takes 77 MB at once.
_SPACE_TO_CREATE = 96 * 1024 * 1024
# A point is written to the log, to the vectors, to the payloads and to the indexes over them.
_COPIES = 4

# Python's bool is a subclass of int, and qdrant-edge takes it for a number.
DIALECT = Dialect(edge, edge.RangeFloat, edge.RangeDateTime, np.bool_)

_QUANTIZATION = {
    "none": None,
    "int8": edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=edge.Memory.Pinned),
    "binary": edge.BinaryQuantizationConfig(memory=edge.Memory.Pinned),
}
BUILD_ANEW = "If it cannot be repaired, delete its folder and index the files again."
"""What is left to do where files are damaged beyond repair."""
LOCK = ".lock"
"""Suffix of the file beside the shard's folder that its user holds locked."""


class EdgeEngine(Engine):
    """qdrant-edge: one shard in a folder, used by one process at a time.

    It holds the GIL while it works: for milliseconds, and ``optimize`` works in another process.

    Args:
        folder: of the shard; a lock file lies beside it.
        schema: how to create the shard if it is missing. It appears under its name only when
            complete.
        first: called with the lock held before the shard is read, to end what a process that
            was killed had begun.

    Raises:
        CollectionError: If it is in use, broken, or the disk is full.
    """

    def __init__(
        self, folder: Path, schema: Schema | None = None, first: Callable[[], None] | None = None
    ) -> None:
        self._folder = folder
        self.quantization: Quantization = "none"
        # To notice a fork: the engine's threads do not come along.
        self._process = os.getpid()
        self._unflushed = 0
        self._count = PointCount(folder)
        # Counting over all points takes longer than a search, and nobody else writes here.
        self._facets: dict[str, dict[str, int]] = {}
        # So does reading the payloads of what a search has found. Set for good: a write makes
        # them forget what it changed.
        self._fields: dict[tuple[str, ...], KeptFields] = {}
        # Held while the shard is used, and by every write: another shard may take its place.
        self._using, self._writing = RLock(), RLock()
        # Writes since the copy was made that is being optimized; None where there is none.
        self._since: list[edge.UpdateOperation] | None = None
        self._shard: edge.EdgeShard | None = None
        # Held before the engine touches a file: its own lock comes after it has written some.
        # Of the process: one of a thread could be released by no other thread.
        self._lock = FileLock(f"{folder}{LOCK}", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise _in_use(folder, "open") from error
        try:
            if first is not None:
                first()
            recover(folder)
            if schema is not None and not folder.is_dir():
                self._create(schema)
            self._need_space("open", 0)
            with self._errors("open"):
                self._shard = edge.EdgeShard.load(str(folder))
            self._count.compare(self.count(Filter()))
        except BaseException:
            self._lock.release()
            raise

    @override
    def upsert(self, points: Sequence[Point]) -> None:
        points = [
            dataclasses.replace(
                point,
                vectors={name: as_stored(name, each) for name, each in point.vectors.items()},
            )
            for point in points
        ]
        rows = [
            edge.Point(
                point.id,
                {name: vector.tolist() for name, vector in point.vectors.items()},
                point.payload | {CHECKSUM_FIELD: checksum(point)},
            )
            for point in points
        ]
        # Nearly all of a point is its vectors, in 4 bytes a number, and its payload.
        size = sum(
            len(json.dumps(point.payload))
            + 4 * sum(vector.size for vector in point.vectors.values())
            for point in points
        )
        self._need_space("write to", _COPIES * size)
        operation = edge.UpdateOperation.upsert_points(rows)
        self._update("write to", operation, [point.id for point in points])
        self._unflushed += len(rows)
        if self._unflushed >= _FLUSH_POINTS:
            self.flush()

    @override
    def delete(self, where: Filter) -> None:
        condition = DIALECT.filter(where)
        operation = edge.UpdateOperation.delete_points_by_filter(condition)
        # Held, so that no point comes to match between the two.
        with self._writing:
            ids = [id_ for page in self._pages_of_ids(SCROLL_PAGE, condition) for id_ in page]
            self._delete(operation, ids)

    @override
    def delete_ids(self, ids: Sequence[str]) -> None:
        # The engine reads what it deletes, and fails over a damaged payload: write a sound one.
        self.upsert([Point(id_, {}) for id_ in ids])
        self._delete(edge.UpdateOperation.delete_points(list(ids)), ids)

    @override
    def retrieve(self, ids: Sequence[str], payload: bool = True) -> list[Point]:
        with self._errors("read from"):
            records = self._open.retrieve(list(ids), payload, False)
        return [as_point(record) for record in records]

    @override
    def rank(
        self,
        queries: Sequence[Nearest | Words],
        limit: int,
        where: Filter,
        payload: Fields = True,
    ) -> list[list[Scored]]:
        asked = [
            edge.Query.Nearest(query.vector.tolist(), using=query.name)
            if isinstance(query, Nearest)
            else edge.TextQuery(TERMS_FIELD, query.terms)
            for query in queries
        ]
        return self._query(asked, limit, DIALECT.filter(where), payload)

    @override
    def max_sim(
        self,
        tokens: NDArray[np.float32],
        ids: Sequence[str],
        where: Filter,
        payload: Fields = True,
    ) -> list[Scored]:
        among = edge.Filter(must=[edge.HasIdCondition(set(ids)), DIALECT.filter(where)])
        query = edge.Query.Nearest(tokens.tolist(), using=TOKENS)
        return self._query([query], len(ids), among, payload)[0]

    @override
    def scroll(self, where: Filter, vectors: bool = False) -> Iterator[Point]:
        condition = DIALECT.filter(where)
        for records in self._pages(SCROLL_PAGE, condition, payload=True, vectors=vectors):
            yield from (as_point(record) for record in records)

    @override
    def count(self, where: Filter) -> int:
        with self._errors("count in"):
            return int(
                self._open.count(edge.CountRequest(exact=True, filter=DIALECT.filter(where)))
            )

    @override
    def count_term(self, term: str) -> int:
        has_term = edge.FieldCondition(key=TERMS_FIELD, match=edge.MatchText(term))
        request = edge.CountRequest(exact=True, filter=edge.Filter(must=[has_term]))
        with self._errors("count in"):
            return int(self._open.count(request))

    @override
    def every_point(self) -> Iterator[Point]:
        # Ids first: a page of points fails as a whole if one of them is damaged.
        for ids in self._pages_of_ids(SCROLL_PAGE):
            yield from self._readable(ids)

    @override
    def read_ahead(self, fields: Sequence[str]) -> Iterator[None]:
        kept = self._kept(tuple(fields))
        for records in self._pages(_AHEAD_PAGE, None, payload=False, vectors=False):
            if kept.full:
                return
            kept.of(_numbers(records))
            yield

    @override
    def is_intact(self, point: Point) -> bool:
        return point.checksum == checksum(point)

    @property
    @override
    def missing(self) -> int:
        return self._count.missing

    @override
    def settle(self) -> None:
        self._count.settle()

    @override
    def create_indexes(self, schema: Schema) -> None:
        self._need_space("index", _SPACE_TO_CREATE)
        for operation in _index_operations(schema):
            self._update("index", operation, ())

    @override
    def drop_index(self, key: str) -> None:
        self._update("index", edge.UpdateOperation.delete_field_index(key), ())

    @override
    def facet(self, key: str) -> dict[str, int]:
        facets = self._facets
        if key not in facets:
            with self._errors("count in"):
                found = self._open.facet(edge.FacetRequest(key=key, limit=FACET_LIMIT, exact=True))
            # An index goes on listing values whose points are gone.
            facets[key] = {str(hit.value): hit.count for hit in found.hits if hit.count}
        return dict(facets[key])

    @override
    def flush(self) -> None:
        # Not while the files are copied: what is in memory moves to them.
        with self._writing, self._errors("flush"):
            self._open.flush()
        self._unflushed = 0

    @override
    def optimize(self, schema: Schema, tick: Callable[[], None] | None = None) -> None:
        if not self._worth_optimizing(schema):
            self.flush()
            return
        # The copy, and the points that are written anew before old files are deleted.
        self._need_space("optimize", 2 * size_on_disk(self._folder))
        with ExitStack() as stack:
            try:
                with self._writing:
                    self.flush()
                    copy = stack.enter_context(copied(self._folder))
                    self._since = []
                build(copy, tick)
                self._replace_by(copy)
            finally:
                self._since = None

    def _worth_optimizing(self, schema: Schema) -> bool:
        """Whether vectors without an index are so many that searches become slow."""
        sizes = {**schema.vectors, **schema.late}
        with self._errors("count in"):
            counts = {name: self._open.count(_has_vector(name)) for name in sizes}
            missing = sum(counts.values()) - self._open.info().indexed_vectors_count
        # Which of the names lack an index is not known; the largest is taken for all.
        return missing * 4 * max(sizes.values()) >= WORTH_BYTES * len(sizes)

    def _replace_by(self, copy: Path) -> None:
        """Let a copy, with what was written since it was made, take the shard's place."""
        with self._writing, self._errors("optimize"):
            shard = edge.EdgeShard.load(str(copy))
            for operation in self._since or ():
                shard.update(operation)
            shard.flush()
            shard.close()
            self._open.close()
            # `recover` completes this if the process is killed in between.
            self._shard, old = None, Path(f"{self._folder}{OLD}")
            self._folder.rename(old)
            copy.rename(self._folder)
            self._shard = edge.EdgeShard.load(str(self._folder))
            shutil.rmtree(old, ignore_errors=True)

    @override
    def close(self) -> None:
        shard, self._shard = self._shard, None
        if self._process != os.getpid():
            return  # the parent closes it, and holds the lock
        try:
            if shard is not None:
                with self._errors("close"):
                    n_points = shard.count(edge.CountRequest(exact=True))
                    shard.close()
                self._count.keep(n_points)
        finally:
            self._lock.release()

    @property
    def _open(self) -> edge.EdgeShard:
        if self._shard is None:
            raise CollectionError(f"The collection {self._folder} is closed; open it again.")
        if self._process != os.getpid():
            raise CollectionError(
                f"The collection {self._folder} was opened before this process was forked, and "
                "cannot be used in it. Start the process by spawn, open the collection in one "
                "process only, or put it on a Qdrant server that all can share."
            )
        return self._shard

    def _pages_of_ids(
        self, limit: int, condition: edge.Filter | None = None
    ) -> Iterator[list[str]]:
        """The ids of the points that match, of all without a condition, ``limit`` at a time."""
        for records in self._pages(limit, condition, payload=False, vectors=False):
            yield [str(record.id) for record in records]

    def _pages(
        self, limit: int, condition: edge.Filter | None, *, payload: bool, vectors: bool
    ) -> Iterator[list[edge.Record]]:
        offset = None
        while True:
            request = edge.ScrollRequest(
                offset=offset,
                limit=limit,
                filter=condition,
                with_payload=payload,
                with_vector=vectors,
            )
            with self._errors("read from"):
                records, offset = self._open.scroll(request)
            yield records
            if offset is None:
                return

    def _readable(self, ids: Sequence[str]) -> Iterator[Point]:
        """The points with these ids; one that cannot be read is found by halving."""
        try:
            with self._errors("read from"):
                records = self._open.retrieve(list(ids), True, True)
        except CollectionError:
            if self._shard is None:
                raise
            if len(ids) == 1:
                yield Point(ids[0], {})
                return
            half = len(ids) // 2
            yield from self._readable(ids[:half])
            yield from self._readable(ids[half:])
        else:
            yield from map(as_point, records)

    def _delete(self, operation: edge.UpdateOperation, ids: Sequence[str]) -> None:
        self._need_space("delete from", 0)
        self._update("delete from", operation, ids)

    def _update(self, doing: str, operation: edge.UpdateOperation, ids: Sequence[str]) -> None:
        """Write. ids: of all points whose payloads change."""
        self._count.forget()
        try:
            with self._writing, self._errors(doing):
                self._open.update(operation)
                if self._since is not None:
                    self._since.append(operation)
        finally:
            # After it: another thread may have read what was there before.
            self._facets = {}
            for kept in list(self._fields.values()):
                kept.forget(ids)

    def _create(self, schema: Schema) -> None:
        for rest in self._folder.parent.glob(f"{self._folder.name}.*new"):
            shutil.rmtree(rest, ignore_errors=True)  # of a process that was killed over it
        self._need_space("create", _SPACE_TO_CREATE)
        unfinished = self._folder.with_name(f"{self._folder.name}.new")
        vectors = {
            name: edge.EdgeVectorParams(
                size=dim,
                distance=edge.Distance.Cosine,
                quantization_config=_QUANTIZATION[schema.quantization],
            )
            for name, dim in schema.vectors.items()
        }
        no_index = edge.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=1)
        for name, dim in schema.late.items():
            max_sim = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
            vectors[name] = edge.EdgeVectorParams(
                size=dim,
                distance=edge.Distance.Dot,
                datatype=edge.VectorStorageDatatype.Float16,
                multivector_config=max_sim if name == TOKENS else None,
                hnsw_config=no_index if name == TOKENS else None,
            )
        config = edge.EdgeConfig(vectors=vectors)
        with self._errors("create"):
            shard = edge.EdgeShard.create(str(unfinished), config)
            for operation in _index_operations(schema):
                shard.update(operation)
            shard.flush()
            shard.close()
        # The folder appears complete or not at all.
        unfinished.rename(self._folder)

    def _need_space(self, doing: str, size: int) -> None:
        need_space(self._folder, doing, size)

    def _query(
        self, queries: Sequence[Any], limit: int, condition: Any, payload: Fields
    ) -> list[list[Scored]]:
        everything = edge.PayloadSelector.Exclude([TERMS_FIELD, CHECKSUM_FIELD])
        # Without quantization this changes nothing.
        times = oversampling(self.quantization, limit)
        rescored = edge.QuantizationSearchParams(rescore=True, oversampling=times)
        requests = [
            edge.QueryRequest(
                limit=limit,
                query=query,
                filter=condition,
                with_payload=everything if payload is True else False,
                params=edge.SearchParams(quantization=rescored),
            )
            for query in queries
        ]
        with self._errors("search"):
            found = self._open.query_batch(edge.QueryBatchRequest(requests))
        return [self._scored(hits, payload) for hits in found]

    def _scored(self, hits: Sequence[Any], payload: Fields) -> list[Scored]:
        if isinstance(payload, bool):
            return [Scored(str(hit.id), hit.score, hit.payload or {}) for hit in hits]
        fields = self._kept(tuple(payload)).of(_numbers(hits))
        # One that was deleted since is left out.
        return [
            Scored(kept[0], hit.score, kept[1])
            for hit, kept in zip(hits, fields, strict=True)
            if kept is not None
        ]

    def _kept(self, names: tuple[str, ...]) -> KeptFields:
        def read(missing: list[int]) -> list[tuple[int, dict[str, Any]]]:
            ids: list[Any] = [UUID(int=number) for number in missing]
            with self._errors("read from"):
                records = self._open.retrieve(ids, list(names), False)
            fields = (record.payload or {} for record in records)
            return list(zip(_numbers(records), fields, strict=True))

        return self._fields.setdefault(names, KeptFields(read))

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Say which action failed: qdrant-edge raises plain Exception for everything."""
        try:
            with self._using:
                yield
        except BaseException as error:
            # A panic of the engine is no Exception, and its class cannot be imported.
            if type(error).__name__ == "PanicException":
                self._shard = None  # its state is not known
                raise CollectionError(
                    f"cannot {doing} {self._folder}: its files are damaged ({error}). {BUILD_ANEW}"
                ) from error
            # KeyboardInterrupt, and errors that are ours, pass through.
            if type(error) not in (Exception, ValueError):
                raise
            if "WouldBlock" in str(error):
                raise _in_use(self._folder, doing) from error
            raise CollectionError(
                f"cannot {doing} {self._folder}: {error}. If its files are damaged, run mmrag "
                f"doctor --repair. {BUILD_ANEW}"
            ) from error


@contextmanager
def locked(shard: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a shard that no engine has open. Raises CollectionError if one has."""
    try:
        with FileLock(f"{shard}{LOCK}", timeout=0):
            yield
    except Timeout as error:
        raise _in_use(shard, doing) from error


def _in_use(shard: Path, doing: str) -> CollectionError:
    return CollectionError(
        f"cannot {doing} {shard}: the collection is in use by another process, or was "
        "opened twice in this one. Close it there, or put it on a Qdrant server that all can "
        "share."
    )


def _index_operations(schema: Schema) -> list[edge.UpdateOperation]:
    terms = edge.TextIndexParams(
        tokenizer=edge.TokenizerType.Whitespace, lowercase=False, scoring=True
    )
    indexes = (
        {TERMS_FIELD: terms}
        | {name: edge.PayloadSchemaType.Keyword for name in schema.keywords}
        | {name: edge.PayloadSchemaType.Integer for name in schema.integers}
    )
    create = edge.UpdateOperation.create_field_index
    return [create(name, index) for name, index in indexes.items()]


def _numbers(found: Sequence[Any]) -> list[int]:
    """The ids of records or hits. All are UUIDs: mmrag alone writes here."""
    return [each.id.int for each in found]


def _has_vector(name: str) -> edge.CountRequest:
    has_it = edge.Filter(must=[edge.HasVectorCondition(name)])
    return edge.CountRequest(exact=True, filter=has_it)
