"""Tokens in both engines, against MaxSim computed here."""

import numpy as np
import pytest
from engines import nearest
from qdrant_client import QdrantClient

from mmrag.errors import ConfigError
from mmrag.store.collection import Collection
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import AnyOf, Filter, Point, Schema
from mmrag.store.server import ServerEngine
from mmrag.store.settings import CollectionSettings, LateSettings

SCHEMA = Schema({"text": 2}, ("kind",), (), late={"tokens": 16, "muvera": 24})
ALL = Filter()


def uid(number):
    return f"00000000-0000-0000-0000-{number:012d}"


def tokens(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TOKENS = {uid(number): tokens(3 + number % 5, number) for number in range(40)}
MUVERA = {id_: np.random.default_rng(int(id_[-4:])).normal(size=24) * 3 for id_ in TOKENS}
POINTS = [
    Point(
        id_,
        {"kind": "page" if number % 2 else "figure"},
        {"tokens": TOKENS[id_], "muvera": MUVERA[id_].astype(np.float32)},
    )
    for number, id_ in enumerate(TOKENS)
]
BARE = Point(uid(99), {"kind": "page"}, {"text": np.array([1, 0], np.float32)})


@pytest.fixture(scope="module", params=["edge", "server"])
def engine(request, tmp_path_factory):
    if request.param == "edge":
        made = EdgeEngine(tmp_path_factory.mktemp("late") / "shard", SCHEMA)
    else:
        made = ServerEngine(QdrantClient(":memory:"), "library", owned=True)
        made.create(SCHEMA)
    made.upsert([*POINTS, BARE])
    made.optimize(SCHEMA)
    yield made
    made.close()


def test_max_sim_is_exact_among_the_points_asked_for(engine):
    query = tokens(6, 1000)
    asked = [*list(TOKENS)[5:25], BARE.id, uid(12345)]
    found = engine.max_sim(query, asked, ALL)
    exact = {id_: (query @ TOKENS[id_].T).max(axis=1).sum() for id_ in asked if id_ in TOKENS}
    assert [hit.id for hit in found] == sorted(exact, key=exact.get, reverse=True)
    for hit in found:  # half precision has 11 bits
        assert hit.score == pytest.approx(exact[hit.id], abs=len(query) * 2**-11)
    assert found[0].payload.keys() == {"kind"}


def test_a_filter_holds_for_max_sim(engine):
    figures = Filter(must=(AnyOf("kind", ("figure",)),))
    found = engine.max_sim(tokens(2, 7), list(TOKENS)[:10], figures)
    assert sorted(hit.id for hit in found) == list(TOKENS)[:10:2]


def test_muvera_is_found_by_its_inner_product(engine):
    """Cosine would take the length away, which counts tokens."""
    query = np.random.default_rng(5).normal(size=24).astype(np.float32)
    found = nearest(engine, "muvera", query, 10, ALL)
    exact = {id_: float(query @ vector) for id_, vector in MUVERA.items()}
    assert [hit.id for hit in found] == sorted(exact, key=exact.get, reverse=True)[:10]
    assert found[0].score == pytest.approx(exact[found[0].id], rel=5e-3)


def test_vectors_come_back_as_they_were_kept(engine):
    stored = {point.id: point for point in engine.scroll(ALL, vectors=True)}
    for id_, expected in TOKENS.items():
        kept = stored[id_].vectors["tokens"]
        np.testing.assert_allclose(kept, expected, atol=2**-11)
        assert engine.is_intact(stored[id_])
    again = Point(uid(1), {"kind": "page"}, stored[uid(1)].vectors)
    engine.upsert([again])
    (point,) = [p for p in engine.scroll(ALL, vectors=True) if p.id == uid(1)]
    assert np.array_equal(point.vectors["tokens"], stored[uid(1)].vectors["tokens"])


LATE = LateSettings("late-model", "f1", 16, 3.0, {"k_sim": 2}, 24)


@pytest.mark.parametrize("where", ["folder", "server"])
def test_a_collection_remembers_how_its_tokens_were_made(tmp_path, where):
    location = tmp_path / "c" if where == "folder" else QdrantClient(":memory:")
    options = {} if where == "folder" else {"images_dir": tmp_path / "i"}
    settings = CollectionSettings("model", fingerprint="1", dim=4, late=LATE)
    Collection.open(location, settings=settings, **options).close()
    with Collection.open(location, **options) as collection:
        assert collection.settings == settings
        assert collection.settings.late.embedder == "late-model"
        with pytest.raises(ConfigError, match=r"shape \(2, 9\).*16 dimensions, made by late-model"):
            collection.max_sim(np.zeros((2, 9), np.float32), [uid(1)])
        with pytest.raises(ConfigError, match="no view 'tokens'; it has image, text, muvera"):
            collection.search("tokens", np.zeros(16, np.float32), 5)
