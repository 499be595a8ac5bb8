"""Metadata that a user gives for files."""

import datetime
import json

import pytest
from fakes import FakeEmbedder
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from qdrant_client import QdrantClient

from mmrag.errors import ConfigError
from mmrag.index import UniversalIndex


@pytest.fixture
def embedder():
    return FakeEmbedder()


@pytest.fixture(params=["folder", "server"])
def index(request, tmp_path, embedder):
    place = tmp_path / "library" if request.param == "folder" else QdrantClient(":memory:")
    with UniversalIndex(place, embedder, images_dir=tmp_path / "images") as index:
        yield index


@pytest.fixture
def papers(tmp_path):
    folder = tmp_path / "papers"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"turbines of the kind {name}")
    return folder


def sidecar(path, content):
    path.with_name(f"{path.name}.meta.json").write_text(content)


def tags(index):
    """File name to metadata of its entry, which each of its nodes and their payload must have."""
    found = {}
    for entry in index.files():
        found[entry.path.name] = entry.metadata
        for node in index.collection.file_nodes(entry.sha256):
            assert {k: v for k, v in node.metadata.items() if k in entry.metadata} == entry.metadata
        assert all(searched(index, key, value) for key, value in entry.metadata.items())
    return found


def searched(index, key, value):
    if isinstance(value, list):
        value = value[0]
    filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value)])
    return index.as_retriever(filters=filters).retrieve("turbines")


def test_a_dict_is_for_all_files(index, papers):
    day = datetime.date(2024, 5, 31)
    index.add(papers, metadata={"team": "wind", "day": day, "tags": ["x"]})
    expected = {"team": "wind", "day": "2024-05-31", "tags": ["x"]}
    assert tags(index) == {"a.txt": expected, "b.txt": expected}
    later = MetadataFilter(key="day", value="2024-05-01", operator=FilterOperator.GT)
    hits = index.as_retriever(filters=MetadataFilters(filters=[later])).retrieve("turbines")
    assert [hit.node.metadata["team"] for hit in hits] == ["wind", "wind"]


def test_a_function_of_the_path(index, papers):
    index.add(papers, metadata=lambda path: {"stem": path.stem} if path.stem == "a" else None)
    assert tags(index) == {"a.txt": {"stem": "a"}, "b.txt": {}}


def test_a_sidecar_is_read_and_what_is_given_lies_over_it(index, papers):
    sidecar(papers / "a.txt", '{"year": 2023, "team": "sea"}')
    report = index.add(papers, metadata={"team": "wind"})
    assert report.passed_over == [] and len(report.indexed) == 2
    assert tags(index) == {"a.txt": {"year": 2023, "team": "wind"}, "b.txt": {"team": "wind"}}


def test_metadata_changes_without_embedding(index, papers, embedder, tmp_path, monkeypatch):
    index.add(papers, metadata={"year": 2023, "old": 1})
    monkeypatch.chdir(tmp_path.parent)  # where the file is must not follow the working directory
    index.add(papers, metadata={"year": 2024})
    assert tags(index) == {"a.txt": {"year": 2024}, "b.txt": {"year": 2024}}
    assert searched(index, "year", 2023) == searched(index, "old", 1) == []
    sidecar(papers / "a.txt", '{"year": 2025}')
    index.add(papers)  # b has no sidecar, and keeps what it has
    assert tags(index) == {"a.txt": {"year": 2025}, "b.txt": {"year": 2024}}
    (papers / "b.txt").rename(papers / "moved.txt")
    index.add(papers, prune=True)
    assert tags(index) == {"a.txt": {"year": 2025}, "moved.txt": {"year": 2024}}
    (papers / "moved.txt").write_text("another content")
    index.add(papers)
    assert tags(index) == {"a.txt": {"year": 2025}, "moved.txt": {"year": 2024}}
    index.add(papers / "moved.txt", metadata={})
    assert tags(index) == {"a.txt": {"year": 2025}, "moved.txt": {}}
    texts = {content.text for call in embedder.calls for content in call} - {"turbines"}
    assert texts == {f"turbines of the kind {name}" for name in "ab"} | {"another content"}
    assert sum(content.text in texts for call in embedder.calls for content in call) == 3


@pytest.mark.parametrize("content", ["{", "[1]", '{"page": 3}'])
def test_a_bad_sidecar_is_reported_and_its_file_is_indexed(index, papers, content):
    sidecar(papers / "a.txt", content)
    report = index.add(papers)
    assert len(report.indexed) == 2
    (error,) = report.errors
    assert error.file.endswith("a.txt.meta.json") and "metadata cannot be used" in str(error)
    sidecar(papers / "a.txt", json.dumps({"fine": 1}))
    assert index.add(papers).errors == []
    assert tags(index)["a.txt"] == {"fine": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"sha256": 1}, "keys sha256"), ({"x": object()}, "JSON"), (lambda _: 3, "give a dict")],
)
def test_useless_metadata_is_refused_before_anything_is_read(index, papers, given, message):
    with pytest.raises(ConfigError, match=message):
        index.add(papers, metadata=given)
    assert index.files() == []


def test_nodes_of_a_run_that_was_cut_short_are_tagged_too(index, papers, embedder, monkeypatch):
    from mmrag.store.collection import Collection

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Collection, "mark_done", stop)
        with pytest.raises(KeyboardInterrupt):
            index.add(papers / "a.txt")
    index.add(papers / "a.txt", metadata={"year": 2024})
    assert tags(index) == {"a.txt": {"year": 2024}}
