"""One contract for both engines."""

import logging
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from engines import bm25, nearest
from qdrant_client import QdrantClient
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from mmrag.errors import CollectionError, EndpointError
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import AnyOf, Filter, Nearest, Point, Schema, Within, Words
from mmrag.store.server import ServerEngine, byte_bounded
from mmrag.store.terms import index_terms, query_terms

SCHEMA = Schema({"text": 4, "image": 4}, ("file", "kind"), ("page",))
ALL = Filter()


def unit(*values):
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def uid(number):
    return f"00000000-0000-0000-0000-{number:012d}"


POINTS = [
    Point(
        uid(1), {"file": "a", "page": 1, "terms": ["red apple", "tree"]}, {"text": unit(1, 0, 0, 0)}
    ),
    Point(
        uid(2),
        {"file": "a", "page": 2, "terms": ["green apple"], "tag": "x", "ok": True, "size": 1.5},
        {"text": unit(0, 1, 0, 0), "image": unit(1, 1, 0, 0)},
    ),
    Point(uid(3), {"file": "b", "page": 3, "tag": 7, "ok": False}, {"image": unit(0, 0, 1, 0)}),
    Point(uid(4), {"file": "b", "kind": "file"}),
]


def make_edge(tmp_path):
    return EdgeEngine(tmp_path / "shard", SCHEMA)


def make_server(tmp_path):
    engine = ServerEngine(QdrantClient(":memory:"), "library", owned=True)
    engine.create(SCHEMA)
    return engine


@pytest.fixture(params=[make_edge, make_server], ids=["edge", "server"])
def engine(request, tmp_path):
    made = request.param(tmp_path)
    made.upsert(POINTS)
    yield made
    made.close()


def ids(points):
    return [int(point.id[-12:]) for point in points]


@pytest.fixture(scope="module", params=[make_edge, make_server], ids=["edge", "server"])
def filled(request, tmp_path_factory):
    """The same, to read from only."""
    made = request.param(tmp_path_factory.mktemp("filled"))
    made.upsert(POINTS)
    yield made
    made.close()


def test_nearest_ranks_by_cosine_and_skips_points_without_the_vector(filled):
    found = nearest(filled, "image", unit(1, 0, 0, 0), 10, ALL)
    assert ids(found) == [2, 3]
    assert found[0].score == pytest.approx(1 / math.sqrt(2), abs=1e-6)
    assert found[0].payload == {k: v for k, v in POINTS[1].payload.items() if k != "terms"}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (True, {"file": "a", "page": 2, "tag": "x", "ok": True, "size": 1.5}),
        (False, {}),
        (("page", "tag", "nothing"), {"page": 2, "tag": "x"}),
    ],
)
def test_a_search_reads_the_fields_that_are_asked_for(filled, payload, expected):
    for found in (
        nearest(filled, "image", unit(1, 1, 0, 0), 1, ALL, payload),
        bm25(filled, "green", 1, ALL, payload),
    ):
        assert [(hit.id, hit.payload) for hit in found] == [(uid(2), expected)]


def test_several_searches_at_once_give_what_each_gives(filled):
    east, south = unit(1, 0, 0, 0), unit(0, 0, 1, 1)
    asked = [
        Nearest("image", east),
        Words("apple"),
        Nearest("text", south),
        Words("tree"),
        Nearest("image", south),
    ]
    only_b = Filter(must=(AnyOf("file", ("b",)),))
    for where, payload in ((ALL, True), (only_b, ("page", "tag"))):
        found = filled.rank(asked, 3, where, payload)
        assert found == [filled.rank([query], 3, where, payload)[0] for query in asked]
        assert any(found)
    assert filled.rank([], 3, ALL) == []


def test_several_searches_are_one_request_to_a_server(tmp_path, monkeypatch):
    made = make_server(tmp_path)
    made.upsert(POINTS)
    asked, send = [], made._call
    monkeypatch.setattr(made, "_call", lambda action: asked.append(action) or send(action))
    found = made.rank([Nearest("image", unit(1, 0, 0, 0)), Words("apple")], 5, ALL, ("page",))
    assert len(asked) == 1
    assert all(found)
    made.close()


def test_limit_bounds_the_results(filled):
    assert len(nearest(filled, "image", unit(1, 0, 0, 0), 1, ALL)) == 1
    assert len(bm25(filled, "apple", 1, ALL)) == 1


def test_bm25_is_the_published_formula(filled):
    """Robertson & Zaragoza 2009, k1 = 1.2, b = 0.75, over the two points that have terms."""
    lengths = [3, 2]
    idf = math.log((2 - 1 + 0.5) / (1 + 0.5) + 1)
    expected = idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * lengths[0] / np.mean(lengths)))
    (hit,) = bm25(filled, "tree", 5, ALL)
    assert ids([hit]) == [1]
    assert hit.score == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (ALL, [1, 2, 3, 4]),
        (Filter(must=(AnyOf("file", ("a",)),)), [1, 2]),
        (
            Filter(must=(AnyOf("file", ("a", "b")),), must_not=(AnyOf("kind", ("file",)),)),
            [1, 2, 3],
        ),
        (Filter(must=(Within("page", 2, None),)), [2, 3]),
        (Filter(must=(Within("page", None, 2),)), [1, 2]),
        (Filter(must=(Within("page", 2, 2),)), [2]),
        (Filter(must=(AnyOf("ok", (True,)),)), [2]),
        (Filter(must=(AnyOf("size", (1.5,)),)), [2]),
        (Filter(must=(AnyOf("tag", ("x", 7)),)), [2, 3]),
        (Filter(must=(AnyOf("tag", (7,)),)), [3]),
        (Filter(must=(AnyOf("file", ("b",)), Within("page", 1, 2))), []),
    ],
)
def test_filters(filled, where, expected):
    assert ids(filled.scroll(where)) == expected
    assert filled.count(where) == len(expected)


def test_filters_apply_to_searches(filled):
    only_b = Filter(must=(AnyOf("file", ("b",)),))
    assert ids(nearest(filled, "image", unit(1, 0, 0, 0), 10, only_b)) == [3]
    assert bm25(filled, "apple", 10, only_b) == []


def test_fields_that_were_read_before_a_write_are_read_again(engine):
    def search():
        found = nearest(engine, "image", unit(1, 1, 0, 0), 9, ALL, ("file", "page"))
        return {int(hit.id[-12:]): hit.payload for hit in found}

    assert search() == {2: {"file": "a", "page": 2}, 3: {"file": "b", "page": 3}}
    engine.upsert([Point(uid(2), {"file": "moved"}, {"image": unit(1, 1, 0, 0)})])
    assert search() == {2: {"file": "moved"}, 3: {"file": "b", "page": 3}}
    engine.delete_ids([uid(3)])
    assert search() == {2: {"file": "moved"}}


def test_upsert_replaces_payload_and_vectors(engine):
    engine.upsert([Point(uid(2), {"file": "c"}, {"text": unit(0, 0, 0, 1)})])
    (stored,) = [p for p in engine.scroll(ALL, vectors=True) if p.id == uid(2)]
    assert stored.payload == {"file": "c"}
    assert set(stored.vectors) == {"text"}
    np.testing.assert_allclose(stored.vectors["text"], unit(0, 0, 0, 1), atol=1e-6)
    assert ids(nearest(engine, "image", unit(1, 0, 0, 0), 10, ALL)) == [3]


def test_retrieve_gives_those_that_exist(filled):
    found = filled.retrieve([uid(1), uid(9)], payload=False)
    assert ids(found) == [1]
    assert filled.retrieve([uid(4)])[0].payload == POINTS[3].payload


def test_delete_by_filter(engine):
    engine.delete(Filter(must=(AnyOf("file", ("a",)),)))
    assert ids(engine.scroll(ALL)) == [3, 4]
    assert bm25(engine, "apple", 5, ALL) == []


def test_scroll_goes_through_many_pages(engine):
    engine.upsert([Point(uid(100 + n), {"file": "many"}) for n in range(600)])
    assert ids(engine.scroll(Filter(must=(AnyOf("file", ("many",)),)))) == list(range(100, 700))


def test_facet_counts_values(filled):
    assert filled.facet("file") == {"a": 2, "b": 2}


def test_facet_forgets_values_whose_points_are_gone(filled):
    filled.optimize(SCHEMA)
    filled.delete(Filter(must=(AnyOf("file", ("a",)),)))
    assert filled.facet("file") == {"b": 2}


TEXTS = {
    "english": "XR-2000/B pumps cost 1,577 euros in FY2015, Q3: naïve ﬁnance.",
    "german": "Die Züge fahren um 12 500 Kilometer weiter als im Jahr zuvor.",
    "russian": "Поезда ходили через города и сёла страны.",
    "hindi": "हिन्दी में लिखा हुआ दस्तावेज़",
    "none": "差旅费报销必须在三十天内提交 รายงานประจำปี 한국어 문서",
}


def test_both_engines_rank_terms_alike(tmp_path):
    """Whatever the script: the server's local mode splits at more than spaces, terms do not."""
    found = []
    for make in (make_edge, make_server):
        engine = make(tmp_path)
        for number, (language, text) in enumerate(TEXTS.items(), start=1):
            terms = " ".join(index_terms(f"{text} page {number}", language))
            engine.upsert([Point(uid(number), {"terms": [terms, "annual report"]})])
        for text in (*TEXTS.values(), "annual page 2.5"):
            hits = bm25(engine, query_terms(text, TEXTS), 10, ALL)
            found.append([(hit.id, round(hit.score, 4)) for hit in hits])
        engine.close()
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert [ranking[0][0] for ranking in found[: len(TEXTS)]] == [uid(n) for n in range(1, 6)]


def test_an_index_that_is_dropped_ranks_nothing(tmp_path):
    engine = make_edge(tmp_path)
    engine.upsert(POINTS)
    engine.drop_index("terms")
    engine.drop_index("terms")
    with pytest.raises(CollectionError, match="search"):
        bm25(engine, "apple", 5, ALL)
    engine.create_indexes(SCHEMA)
    assert ids(bm25(engine, "apple", 5, ALL)) == [2, 1]
    engine.close()


def test_edge_keeps_its_data_and_refuses_a_second_user(tmp_path):
    first = make_edge(tmp_path)
    first.upsert(POINTS)
    with pytest.raises(CollectionError, match="in use"):
        EdgeEngine(tmp_path / "shard")
    first.close()
    first.close()
    second = EdgeEngine(tmp_path / "shard")
    second.optimize(SCHEMA)
    assert ids(second.scroll(ALL)) == [1, 2, 3, 4]
    second.close()
    with pytest.raises(CollectionError, match="is closed"):
        second.count(ALL)


def test_edge_is_released_by_another_thread_than_opened_it(tmp_path):
    with ThreadPoolExecutor(1) as thread:
        engine = thread.submit(make_edge, tmp_path).result()
        engine.close()
        # Were it collected, its lock would go with it.
        make_edge(tmp_path).close()
        del engine


def test_edge_creation_that_was_cut_short_is_done_again(tmp_path):
    leftover = tmp_path / "shard.new" / "segments"
    leftover.mkdir(parents=True)
    engine = make_edge(tmp_path)
    assert engine.count(ALL) == 0
    assert not leftover.exists()
    engine.close()


def test_edge_says_what_is_broken(tmp_path):
    (tmp_path / "shard").mkdir()
    with pytest.raises(CollectionError, match="cannot open"):
        EdgeEngine(tmp_path / "shard")


class PanicException(BaseException):
    """As pyo3 raises it for a panic: no Exception, and of no module that can be imported."""


def test_a_panic_of_the_engine_is_a_damaged_collection(tmp_path, monkeypatch):
    engine = make_edge(tmp_path)

    class Panicking:
        def count(self, _):
            raise PanicException("index out of bounds")

    engine._shard.close()
    engine._shard = Panicking()
    with pytest.raises(CollectionError, match=r"damaged .*index the files again"):
        engine.count(ALL)
    with pytest.raises(CollectionError, match="is closed"):
        engine.count(ALL)
    engine.close()
    EdgeEngine(tmp_path / "shard").close()  # it was released


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(path):
        return shutil._ntuple_diskusage(10**12, 10**12 - 50_000_000, 50_000_000)

    engine = make_edge(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(shutil, "disk_usage", full)
        disk.setattr("mmrag.store.edge.WORTH_BYTES", 0)
        for write in (
            lambda: engine.upsert(POINTS),
            lambda: engine.delete(ALL),
            lambda: engine.optimize(SCHEMA),
        ):
            with pytest.raises(CollectionError, match=r"50 MB free.*needed.*Free some space"):
                write()
        with pytest.raises(CollectionError, match="50 MB free"):
            EdgeEngine(tmp_path / "other", SCHEMA)
    assert engine.count(ALL) == 0
    engine.upsert(POINTS)
    assert engine.count(ALL) == 4
    engine.close()


def test_batches_are_bounded_by_count_and_bytes():
    points = [Point(uid(n), {"text": "x" * 1000}, {"text": unit(1, 0, 0, 0)}) for n in range(10)]
    assert [len(batch) for batch in byte_bounded(points, max_points=4)] == [4, 4, 2]
    assert [len(batch) for batch in byte_bounded(points, max_bytes=3600)] == [3, 3, 3, 1]
    assert [len(batch) for batch in byte_bounded(points, max_bytes=10)] == [1] * 10
    assert list(byte_bounded([])) == []


class Flaky:
    """A client whose upserts fail in the ways given, then work."""

    def __init__(self, failures):
        self.inner = QdrantClient(":memory:")
        self._client = None
        self.failures = list(failures)
        self.upserts = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def upsert(self, name, rows, wait):
        if self.failures:
            raise self.failures.pop(0)
        self.upserts.append(len(rows))
        return self.inner.upsert(name, rows, wait=wait)


def refused(status, body=b"no"):
    return UnexpectedResponse(status, "reason", body, httpx.Headers())


def flaky_engine(*failures):
    client = Flaky(failures)
    engine = ServerEngine(client, "library", owned=True, pause=0.001)
    engine._local = True
    engine.create(SCHEMA)
    return client, engine


def test_server_retries_what_passes(caplog):
    away = ResponseHandlingException(ConnectionError("connection refused"))
    _, engine = flaky_engine(away, refused(503), refused(429))
    with caplog.at_level(logging.WARNING):
        engine.upsert(POINTS)
    assert engine.count(ALL) == 4
    assert caplog.text.count("Qdrant server: ") == 3


def test_server_that_stays_away_is_an_endpoint_error():
    away = ResponseHandlingException(ConnectionError("connection refused"))
    _, engine = flaky_engine(*[away] * 50)
    with pytest.raises(EndpointError, match=r"connection refused.*[Cc]heck"):
        engine.upsert(POINTS)


@pytest.mark.parametrize(("status", "text"), [(400, "library.*400.*no"), (403, "API key")])
def test_server_that_refuses_is_not_asked_again(status, text):
    client, engine = flaky_engine(refused(status))
    with pytest.raises(CollectionError, match=text):
        engine.upsert(POINTS)
    assert client.upserts == []


def test_server_writes_in_bounded_batches():
    client, engine = flaky_engine()
    engine.upsert([Point(uid(n), {"file": "many"}) for n in range(300)])
    assert client.upserts == [128, 128, 44]


def test_an_unreachable_server_says_so():
    client = QdrantClient("http://127.0.0.1:9", check_compatibility=False, timeout=1)
    engine = ServerEngine(client, "library", owned=True, pause=0.001)
    with pytest.raises(EndpointError, match="cannot be used after 5 attempts"):
        engine.exists()
