"""Damage to the files of a collection is noticed, and repaired from the files it was made of."""

import dataclasses
import json
import os
import struct
from uuid import UUID

import damaged_stores
import numpy as np
import pytest
import qdrant_edge as edge
from fakes import FakeEmbedder, make_node
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import mmrag.embedders
from mmrag.cli.app import app
from mmrag.errors import CollectionError
from mmrag.index import UniversalIndex
from mmrag.store.checksums import checksum
from mmrag.store.collection import Collection
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import AnyOf, Filter, Point, Schema
from mmrag.store.point_count import COUNT

FULL = os.environ.get("MMRAG_HOSTILE") == "full"
EMBEDDER = FakeEmbedder()
POINT = Point(
    str(UUID(int=1)), {"file": "a.pdf", "page": 1}, {"text": np.array([0.6, 0.8], np.float32)}
)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Three files with two nodes each; the working directory is the one above them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("one", "two", "three"):
        text = f"# First\n\nThe words of {name}.\n\n# Second\n\nMore words of {name}."
        (tmp_path / "texts" / f"{name}.md").write_text(text)
    return tmp_path / "texts"


@pytest.fixture
def library(texts, tmp_path):
    with UniversalIndex(tmp_path / "library", EMBEDDER) as index:
        index.add("texts")
    return tmp_path / "library"


def ids_of(collection, name):
    nodes = Filter((AnyOf("file", (f"texts/{name}.md",)),), (AnyOf("kind", ("file",)),))
    return sorted(point.id for point in collection._engine.scroll(nodes))


def behind_its_back(collection, operation):
    """Change the shard as damage would: without a new checksum and without counting."""
    collection._engine._open.update(operation)


@pytest.mark.parametrize(
    "other",
    [
        {"id": str(UUID(int=2))},
        {"payload": {"file": "b.pdf", "page": 1}},
        {"payload": {"file": "a.pdf", "page": True}},
        {"payload": {"file": "a.pdf"}},
        {"vectors": {"text": np.array([0.6, np.nextafter(np.float32(0.8), 1)], np.float32)}},
        {"vectors": {"image": np.array([0.6, 0.8], np.float32)}},
        {"vectors": {}},
    ],
)
def test_a_checksum_depends_on_everything_in_a_point(other):
    assert checksum(dataclasses.replace(POINT, **other)) != checksum(POINT)


def test_a_checksum_does_not_depend_on_the_order_of_the_payload():
    turned = dataclasses.replace(POINT, payload=dict(reversed(POINT.payload.items())))
    assert checksum(turned) == checksum(POINT)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = EdgeEngine(tmp_path_factory.mktemp("e") / "shard", Schema({"v": 3}, ("kind",), ()))
    yield engine
    engine.close()


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=9), VALUES),
    st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3),
)
def test_whatever_is_stored_reads_as_intact(engine, payload, vector):
    payload.pop("checksum", None)
    id_ = str(UUID(int=7))
    engine.upsert([Point(id_, payload, {"v": np.array(vector, np.float32)})])
    (point,) = engine.every_point()
    assert engine.is_intact(point)


@pytest.mark.parametrize("dim", [384, 1536, 4096])
def test_vectors_of_any_length_read_as_intact(tmp_path, dim):
    engine = EdgeEngine(tmp_path / "shard", Schema({"v": dim}, (), ()))
    rows = np.random.default_rng(dim).standard_normal((200, dim)).astype(np.float32)
    engine.upsert([Point(str(UUID(int=i)), {}, {"v": row}) for i, row in enumerate(rows, 1)])
    points = list(engine.every_point())
    assert len(points) == 200 and all(map(engine.is_intact, points))
    engine.upsert(points)  # as moving a file does
    again = {point.id: point.vectors["v"].tobytes() for point in engine.every_point()}
    assert again == {point.id: point.vectors["v"].tobytes() for point in points}
    engine.close()


def test_a_sound_collection_is_called_sound(library):
    with Collection.open(library) as collection:
        found = collection.examine()
    assert not found.damaged and not found.unfinished


def test_changed_bytes_of_a_vector_are_found_and_repaired(library, texts):
    with UniversalIndex(library, EMBEDDER) as index:
        points, _, _ = whole = read(index.collection)
        vector = points[ids_of(index.collection, "two")[0]][1]["text"]
    (chunk,) = library.rglob("vector_storage-text/vectors/chunk_0.mmap")
    data = bytearray(chunk.read_bytes())
    at = data.index(vector)
    data[at : at + 4] = struct.pack("<f", struct.unpack("<f", vector[:4])[0] + 1e-6)
    chunk.write_bytes(data)
    embedder = FakeEmbedder()
    with UniversalIndex(library, embedder) as index:
        found = index.collection.examine()
        assert len(found.altered) == 1
        assert [(entry.file, lost) for entry, lost in found.lost.items()] == [("texts/two.md", 1)]
        assert index.repair(found) == 0
        assert not index.collection.examine().damaged
        assert read(index.collection) == whole
    assert embedder.encoded == 1


def read(collection):
    """Points, and files with their paths."""
    points = {
        point.id: (point.payload, {name: v.tobytes() for name, v in point.vectors.items()})
        for point in collection._engine.every_point()
    }
    return points, collection.paths(), collection.files()


def test_a_payload_that_cannot_be_read_costs_its_point_only(library):
    with UniversalIndex(library, EMBEDDER) as index:
        whole = read(index.collection)
    (page,) = library.rglob("payload_storage/page_0.dat")
    data = bytearray(page.read_bytes())
    used = len(data.rstrip(b"\0"))
    data[used // 2 : used // 2 + 40] = os.urandom(40)
    page.write_bytes(data)
    with UniversalIndex(library, EMBEDDER) as index:
        found = index.collection.examine()
        assert 1 <= len(found.altered) <= 2
        index.repair(found)
        assert not index.collection.examine().damaged
        assert read(index.collection) == whole


def test_a_damaged_entry_of_a_file_is_made_again(library):
    with UniversalIndex(library, EMBEDDER) as index:
        whole = read(index.collection)
        entry = Filter((AnyOf("kind", ("file",)), AnyOf("file", ("texts/two.md",))))
        (point,) = index.collection._engine.scroll(entry)
        wrong = edge.UpdateOperation.set_payload([point.id], {"nodes": 99})
        behind_its_back(index.collection, wrong)
        assert [entry.file for entry in index.files()] == ["texts/one.md", "texts/three.md"]
        found = index.collection.examine()
        assert found.altered == [point.id]
        assert [entry.file for entry in found.unfinished] == ["texts/two.md"]
        index.repair(found)
        assert not index.collection.examine().damaged
        assert read(index.collection) == whole


def test_damaged_settings_are_said(library):
    with Collection.open(library) as collection:
        settings_id = next(collection._engine.scroll(Filter((AnyOf("kind", ("settings",)),)))).id
        behind_its_back(collection, edge.UpdateOperation.set_payload([settings_id], {"weights": 1}))
    with pytest.raises(CollectionError, match=r"settings of .* are damaged"):
        Collection.open(library)


@pytest.mark.parametrize(
    ("method", "wrong", "key"),
    [
        ("facet", {"texts/one.md": 7}, "file"),
        ("count_term", 0, "terms"),
        ("count", 5, "page"),
    ],
)
def test_an_index_that_disagrees_is_made_anew(library, monkeypatch, method, wrong, key):
    with UniversalIndex(library, EMBEDDER) as index:
        collection = index.collection
        store = collection._engine
        collection.write([make_node("a page")], [{}])
        with monkeypatch.context() as damaged:
            damaged.setattr(store, method, lambda *_: wrong)
            found = collection.examine()
        assert key in found.indexes
        store.drop_index(key)
        collection.clear_damage(found)
        assert not collection.examine().damaged
        assert len(collection.search_text("two", 9)) == 2


def test_points_that_are_gone_are_said_on_opening(library, caplog):
    with Collection.open(library) as collection:
        behind_its_back(collection, edge.UpdateOperation.delete_points(ids_of(collection, "two")))
    assert not caplog.records
    with Collection.open(library) as collection:
        assert "holds 8 points, and 10 were stored" in caplog.text
        assert collection.examine().missing == 2
    caplog.clear()
    with UniversalIndex(library, EMBEDDER) as index:
        assert caplog.records  # until it is repaired
        assert index.repair(index.collection.examine()) == 0
    caplog.clear()
    with Collection.open(library):
        assert not caplog.records


def test_a_file_that_is_gone_with_its_entry_is_said(library, caplog):
    with Collection.open(library) as collection:
        everything = edge.Filter(
            must=[edge.FieldCondition(key="file", match=edge.MatchValue("texts/two.md"))]
        )
        behind_its_back(collection, edge.UpdateOperation.delete_points_by_filter(everything))
    with UniversalIndex(library, EMBEDDER) as index:
        found = index.collection.examine()
        assert (found.missing, found.lost, found.unfinished) == (3, {}, [])
        assert index.repair(found) == 3


def test_a_run_that_was_killed_leaves_no_number(library):
    number = library / f"qdrant{COUNT}"
    assert number.read_text() == "10"
    with UniversalIndex(library, EMBEDDER) as index:
        index.files()
        assert number.exists()  # nothing has been written
        index.remove("two.md")
        assert not number.exists()
    assert number.read_text() == "7"


def test_only_what_was_indexed_is_read_again(library, texts):
    with UniversalIndex(library, EMBEDDER) as index:
        behind_its_back(
            index.collection, edge.UpdateOperation.delete_points(ids_of(index.collection, "two"))
        )
        (texts / "two.md").write_text("# First\n\nA secret.\n\n# Second\n\nMore of it.")
        index.repair(index.collection.examine())
        assert index.collection.search_text("secret", 9) == []
        assert [entry.file for entry in index.collection.examine().lost] == ["texts/two.md"]


def test_files_are_found_again_from_another_working_directory(library, tmp_path, monkeypatch):
    with UniversalIndex(library, EMBEDDER) as index:
        whole = read(index.collection)
        behind_its_back(
            index.collection, edge.UpdateOperation.delete_points(ids_of(index.collection, "two"))
        )
        monkeypatch.chdir("/")
        index.repair(index.collection.examine())
        assert read(index.collection) == whole


def test_doctor_names_what_is_damaged_and_repairs_it(library, monkeypatch):
    monkeypatch.setattr(mmrag.embedders, "load_embedder", lambda name, **_: FakeEmbedder())

    def run(*options):
        result = CliRunner().invoke(app, ["doctor", "-c", str(library), *options])
        return result.exit_code, result.stdout

    code, said = run()
    assert (code, said.endswith("\n\nNothing is damaged.\n")) == (0, True)
    with Collection.open(library) as collection:
        lost, changed = ids_of(collection, "two")[:1], ids_of(collection, "one")[:1]
        behind_its_back(collection, edge.UpdateOperation.delete_points(lost))
        behind_its_back(collection, edge.UpdateOperation.set_payload(changed, {"text": "other"}))
    code, said = run()
    assert code == 1
    for line in (
        "1 points fewer than when the collection was last closed.",
        "1 points are not as they were written.",
        "texts/two.md: 1 of 2 nodes are lost.",
        "texts/one.md: 1 of 2 nodes are lost.",
        "Run mmrag doctor --repair",
    ):
        assert line in said
    code, said = run("--json")
    assert code == 1
    assert json.loads(said)["found"]["lost"] == {"texts/one.md": 1, "texts/two.md": 1}
    code, said = run("--repair")
    assert (code, said.endswith("After the repair:\nNothing is damaged.\n")) == (0, True)
    assert run()[0] == 0


@pytest.mark.slow
def test_no_damage_is_silent(tmp_path):
    """Of 200 stores with the variable MMRAG_HOSTILE=full, of 40 without."""
    count = 200 if FULL else 40
    counts = damaged_stores.check(tmp_path, count, seed=20261127)
    assert set(counts) <= {"harmless", "refused", "repaired", "not repaired"}
    assert counts["repaired"] + counts["refused"] >= count / 20
