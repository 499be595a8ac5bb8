"""The engine on a Qdrant server, through qdrant-client."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_client.local.qdrant_local import QdrantLocal
from typing_extensions import override

from mmrag.errors import CollectionError, EndpointError
from mmrag.retries import RETRIED_STATUS, BusyError, Deadline, with_retries
from mmrag.store.engine import (
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

log = logging.getLogger(__name__)

MAX_BATCH_POINTS = 128
# Half of the 32 MiB that a Qdrant server accepts by default in one request.
MAX_BATCH_BYTES = 16 * 1024 * 1024
_ATTEMPTS = 5
_BUSY = RETRIED_STATUS - {409}  # to Qdrant, a conflict is that the collection exists already
DIALECT = Dialect(models, models.Range, models.DatetimeRange)
_FIRST_SERVER_WITH_BM25 = (1, 20)
_QUANTIZATION: dict[str, Any] = {
    "none": None,
    "int8": models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
    ),
    "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True)),
}
Result = TypeVar("Result")


class ServerEngine(Engine):
    """A collection on a Qdrant server of version 1.20 or newer, through qdrant-client.

    Writes go in batches bounded by bytes, and everything is retried with growing pauses while
    the server is away. A client in local mode (``QdrantClient(":memory:")``) works too, for
    tests.
    """

    def __init__(
        self, client: QdrantClient, name: str, *, owned: bool, pause: float | None = None
    ) -> None:
        """Use ``client``; ``owned`` says that ``close`` closes it.

        pause: seconds between two tries; None: half a second, doubled each time.
        """
        self._client = client
        self._name = name
        self._owned = owned
        self._pause = pause
        self.quantization: Quantization = "none"
        # Local mode lacks payload indexes, facets of them, and other tokenizers.
        self._local = isinstance(client._client, QdrantLocal)

    def exists(self) -> bool:
        """Whether the server has the collection. Raises CollectionError for an old server."""
        self._check_version()
        return bool(self._call(lambda: self._client.collection_exists(self._name)))

    def vector_dims(self) -> dict[str, int]:
        """Name to dimension of the collection's vectors; an unnamed one is called ``""``."""
        stored = self._call(lambda: self._client.get_collection(self._name)).config.params.vectors
        named = stored if isinstance(stored, dict) else {"": stored}
        return {name: params.size for name, params in named.items() if params is not None}

    def create(self, schema: Schema) -> None:
        """Create the collection and its indexes; what is there already is kept."""
        if not self.exists():
            vectors = {
                name: models.VectorParams(
                    size=dim,
                    distance=models.Distance.COSINE,
                    quantization_config=_QUANTIZATION[schema.quantization],
                )
                for name, dim in schema.vectors.items()
            }
            max_sim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
            vectors |= {
                name: models.VectorParams(
                    size=dim,
                    distance=models.Distance.DOT,
                    datatype=models.Datatype.FLOAT16,
                    multivector_config=max_sim if name == TOKENS else None,
                    hnsw_config=models.HnswConfigDiff(m=0) if name == TOKENS else None,
                )
                for name, dim in schema.late.items()
            }
            self._call(lambda: self._client.create_collection(self._name, vectors_config=vectors))
        self.create_indexes(schema)

    @override
    def upsert(self, points: Sequence[Point]) -> None:
        for batch in byte_bounded(points):
            rows = [
                models.PointStruct(
                    id=point.id,
                    vector={name: vector.tolist() for name, vector in point.vectors.items()},
                    payload=point.payload,
                )
                for point in batch
            ]
            # Waited for, so that what was written is found by the next search.
            self._call(partial(self._client.upsert, self._name, rows, wait=True))

    @override
    def delete(self, where: Filter) -> None:
        selector = models.FilterSelector(filter=DIALECT.filter(where))
        self._call(lambda: self._client.delete(self._name, selector, wait=True))

    @override
    def delete_ids(self, ids: Sequence[str]) -> None:
        selector = models.PointIdsList(points=list(ids))
        self._call(lambda: self._client.delete(self._name, selector, wait=True))

    @override
    def retrieve(self, ids: Sequence[str], payload: bool = True) -> list[Point]:
        records = self._call(
            lambda: self._client.retrieve(self._name, list(ids), with_payload=payload)
        )
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
            (query.vector.tolist(), query.name)
            if isinstance(query, Nearest)
            else (models.TextQuery(text=query.terms), TERMS_FIELD)
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
        same = models.HasIdCondition(has_id=list(ids))
        among = models.Filter(must=[same, DIALECT.filter(where)])
        return self._query([(tokens.tolist(), TOKENS)], len(ids), among, payload)[0]

    @override
    def scroll(self, where: Filter, vectors: bool = False) -> Iterator[Point]:
        offset, condition = None, DIALECT.filter(where)
        while True:
            fetch = partial(
                self._client.scroll,
                self._name,
                scroll_filter=condition,
                limit=SCROLL_PAGE,
                offset=offset,
                with_payload=True,
                with_vectors=vectors,
            )
            records, offset = self._call(fetch)
            yield from (as_point(record) for record in records)
            if offset is None:
                return

    @override
    def count(self, where: Filter) -> int:
        return self._call(
            lambda: self._client.count(self._name, count_filter=DIALECT.filter(where), exact=True)
        ).count

    @override
    def count_term(self, term: str) -> int:
        has_term = models.FieldCondition(key=TERMS_FIELD, match=models.MatchText(text=term))
        condition = models.Filter(must=[has_term])
        return self._call(
            lambda: self._client.count(self._name, count_filter=condition, exact=True)
        ).count

    @override
    def every_point(self) -> Iterator[Point]:
        return self.scroll(Filter(), vectors=True)

    @override
    def read_ahead(self, fields: Sequence[str]) -> Iterator[None]:
        return iter(())

    @override
    def is_intact(self, point: Point) -> bool:
        return True

    @property
    @override
    def missing(self) -> int:
        return 0

    @override
    def settle(self) -> None:
        return None

    @override
    def create_indexes(self, schema: Schema) -> None:
        terms = models.TextIndexParams(
            type=models.TextIndexType.TEXT,
            tokenizer=models.TokenizerType.WHITESPACE,
            lowercase=False,
            scoring=True,
        )
        indexes: dict[str, Any] = (
            {TERMS_FIELD: terms}
            | {name: models.PayloadSchemaType.KEYWORD for name in schema.keywords}
            | {name: models.PayloadSchemaType.INTEGER for name in schema.integers}
        )
        if self._local:
            # Local mode has no other index and no other tokenizer. It takes each run of letters
            # and digits as a token, and terms are nothing else.
            plain = models.TextIndexParams(type=models.TextIndexType.TEXT, scoring=True)
            indexes = {TERMS_FIELD: plain}
        for name, index in indexes.items():
            self._call(
                partial(self._client.create_payload_index, self._name, name, index, wait=True)
            )

    @override
    def drop_index(self, key: str) -> None:
        if not self._local:
            self._call(lambda: self._client.delete_payload_index(self._name, key, wait=True))

    @override
    def facet(self, key: str) -> dict[str, int]:
        found = self._call(
            lambda: self._client.facet(self._name, key, limit=FACET_LIMIT, exact=True)
        )
        # An index goes on listing values whose points are gone.
        return {str(hit.value): hit.count for hit in found.hits if hit.count}

    @override
    def flush(self) -> None:
        return None

    @override
    def optimize(self, schema: Schema, tick: Callable[[], None] | None = None) -> None:
        return None

    def create_snapshot(self) -> str:
        """Have the server keep a snapshot of the collection; returns what it calls it."""
        made = self._call(lambda: self._client.create_snapshot(self._name, wait=True))
        assert made is not None  # it is for requests that are not waited for
        return str(made.name)

    def restore_snapshot(self, snapshot: str, url: str, api_key: str | None) -> None:
        """Have the server give the collection the points of a snapshot that it keeps.

        url: of the server, under which it reaches itself. api_key: of it.
        """
        self._call(
            lambda: self._client.recover_snapshot(
                self._name,
                # It takes addresses only, or paths of its own disk, which nobody else knows.
                f"{url.rstrip('/')}/collections/{quote(self._name)}/snapshots/{quote(snapshot)}",
                api_key=api_key,
                priority=models.SnapshotPriority.SNAPSHOT,
                wait=True,
            )
        )

    @override
    def close(self) -> None:
        if self._owned:
            self._client.close()

    def _query(
        self, queries: Sequence[tuple[Any, str]], limit: int, condition: Any, payload: Fields
    ) -> list[list[Scored]]:
        """queries: each with the name of the vector or field that it looks in."""
        everything = models.PayloadSelectorExclude(exclude=[TERMS_FIELD])
        selected = payload if isinstance(payload, bool) else list(payload)
        # Without quantization this changes nothing.
        times = oversampling(self.quantization, limit)
        rescored = models.QuantizationSearchParams(rescore=True, oversampling=times)
        params = models.SearchParams(quantization=rescored)
        requests = [
            models.QueryRequest(
                query=query,
                using=using,
                limit=limit,
                filter=condition,
                params=None if self._local else params,
                with_payload=everything if payload is True else selected,
            )
            for query, using in queries
        ]
        found = self._call(lambda: self._client.query_batch_points(self._name, requests))
        return [
            [Scored(str(hit.id), float(hit.score), hit.payload or {}) for hit in each.points]
            for each in found
        ]

    def _check_version(self) -> None:
        version = str(self._call(self._client.info).version)
        # "1.20.0-dev" and "1.20" are versions too.
        numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
        if numbers < _FIRST_SERVER_WITH_BM25:
            raise CollectionError(
                f"The Qdrant server is version {version}; mmrag needs 1.20 or newer for BM25 "
                "on its text index. Upgrade the server."
            )

    def _call(self, action: Callable[[], Result]) -> Result:
        """Run one request, again after a pause while the server is away or busy."""

        def ask() -> Result:
            try:
                return action()
            except (ResponseHandlingException, ResourceExhaustedResponse) as error:
                failure: Exception = error
            except UnexpectedResponse as error:
                if error.status_code in (401, 403):
                    raise CollectionError(
                        "The Qdrant server refused the API key; give a valid api_key."
                    ) from error
                if error.status_code not in _BUSY:
                    body = error.content.decode(errors="replace")[:500]
                    raise CollectionError(
                        f"The Qdrant server refused a request on the collection {self._name!r} "
                        f"(status {error.status_code}): {body}"
                    ) from error
                failure = error
            # Said each time: a long pause without a word looks like a hang.
            log.warning("Qdrant server: %s", failure)
            given_up = EndpointError(
                f"The Qdrant server cannot be used after {_ATTEMPTS} attempts ({failure}). Check "
                "that it runs and that the address is right; then run the same command again."
            )
            raise BusyError(given_up, self._pause) from failure

        return with_retries(ask, _ATTEMPTS - 1, Deadline())


def byte_bounded(
    points: Sequence[Point],
    max_points: int = MAX_BATCH_POINTS,
    max_bytes: int = MAX_BATCH_BYTES,
) -> Iterator[list[Point]]:
    """Cut points into batches of bounded count and size; a single larger point goes alone."""
    batch: list[Point] = []
    size = 0
    for point in points:
        # A float takes at most 24 characters in JSON, its separator included.
        numbers = sum(vector.size for vector in point.vectors.values())
        cost = len(json.dumps(point.payload, ensure_ascii=False).encode()) + 24 * numbers
        if batch and (len(batch) == max_points or size + cost > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += cost
    if batch:
        yield batch
