"""The one object that users hold."""

import dataclasses
import logging
import threading
from pathlib import Path

import pytest
from fakes import FakeEmbedder, Scripted
from llama_index.core import Settings
from qdrant_client import QdrantClient

import mmrag.embedders
from mmrag.embedding import UniversalEmbedding
from mmrag.errors import CollectionError, ConfigError, MissingCollectionError, ModelError
from mmrag.index import UniversalIndex
from mmrag.ingest.progress import Progress
from mmrag.reading import ReadOptions
from mmrag.retrieval.fusion import PAGE_FIELDS
from mmrag.store.collection import Collection
from mmrag.store.edge import EdgeEngine


@pytest.fixture
def papers(tmp_path):
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "a.txt").write_text("turbines turn in the wind")
    (folder / "b.txt").write_text("eye exams are covered by the plus plan")
    return folder


@pytest.fixture
def library(papers, tmp_path):
    """Where a library with both papers is."""
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.add(papers)
    return tmp_path / "library"


def server(tmp_path):
    return {"location": QdrantClient(":memory:"), "images_dir": tmp_path / "images"}


def test_add_find_and_answer(papers, tmp_path):
    index = UniversalIndex(**server(tmp_path), embed_model=FakeEmbedder())
    report = index.add(papers)
    assert len(report.indexed) == 2
    assert [Path(entry.file).name for entry in index.files()] == ["a.txt", "b.txt"]
    hits = index.as_retriever(similarity_top_k=1).retrieve("which plan covers eye exams")
    assert [Path(hit.node.metadata["file"]).name for hit in hits] == ["b.txt"]
    answer = index.as_query_engine(similarity_top_k=2).query("which plan covers eye exams?")
    assert "plus plan" in str(answer)


def test_nothing_is_made_before_something_is_added(tmp_path):
    index = UniversalIndex(tmp_path / "library", FakeEmbedder())
    with pytest.raises(MissingCollectionError, match="ndex something"):
        index.as_retriever()
    with pytest.raises(MissingCollectionError):
        index.files()
    assert not (tmp_path / "library").exists()


def test_it_is_opened_as_it_was_built(papers, tmp_path):
    place = server(tmp_path)
    built = {"dim": 16, "views": ["text"], "language": "german", "reading": ReadOptions(dpi=72)}
    UniversalIndex(**place, embed_model=FakeEmbedder(), **built).add(papers)
    again = UniversalIndex(**place, embed_model=FakeEmbedder())
    settings = again.collection.settings
    assert (settings.dim, settings.views, settings.language) == (16, ("text",), "german")
    assert settings.reading["dpi"] == 72
    assert len(again.add(papers).unchanged) == 2


def test_the_embedder_that_built_it_is_loaded_by_name(library, monkeypatch):
    loaded = []

    def load(name, **_):
        loaded.append(name)
        return FakeEmbedder()

    monkeypatch.setattr(mmrag.embedders, "load_embedder", load)
    with UniversalIndex(library) as index:
        assert len(index.files()) == 2
        assert loaded == []
        assert len(index.as_retriever().retrieve("wind")) == 2
        assert loaded == ["fake"]


def test_a_model_in_a_folder_is_found_from_any_working_directory(papers, tmp_path, monkeypatch):
    loaded = []

    def load(name, **_):
        loaded.append(str(name))
        return FakeEmbedder("./model")

    monkeypatch.setattr(mmrag.embedders, "load_embedder", load)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    with UniversalIndex(tmp_path / "library", "./model") as index:
        index.add(papers)
    monkeypatch.chdir(papers)
    (papers / "new.md").write_text("What was not there before, in words enough for a passage.")
    with UniversalIndex(tmp_path / "library") as index:
        index.add(papers)
    assert loaded == ["./model", str(tmp_path / "model")]


def test_a_model_that_has_changed_since_is_refused(library, monkeypatch):
    newer = FakeEmbedder(version="2")
    monkeypatch.setattr(mmrag.embedders, "load_embedder", lambda name, **_: newer)
    with (
        UniversalIndex(library) as index,
        pytest.raises(CollectionError, match=r"another version of 'fake'"),
    ):
        index.as_retriever()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_model": FakeEmbedder(name="other")}, "not by 'other'"),
        ({"dim": 16}, "dim: 32, not 16"),
        ({"views": ["text"]}, "views"),
        ({"reading": ReadOptions(dpi=72)}, "reading"),
    ],
)
def test_what_contradicts_the_collection_is_refused_and_it_is_released(library, options, message):
    for _ in range(2):
        with pytest.raises(CollectionError, match=message):
            UniversalIndex(library, **options)


def test_limits_of_reading_may_change(library):
    UniversalIndex(library, reading=ReadOptions(page_seconds=5)).close()


def test_views_follow_what_the_embedder_can(papers, tmp_path):
    index = UniversalIndex(**server(tmp_path), embed_model=FakeEmbedder(modalities=("text",)))
    report = index.add(papers)
    assert index.collection.settings.views == ("text",)
    assert report.notes == []


def test_a_universal_embedding_brings_its_embedder_and_dimensions(papers, tmp_path):
    model = UniversalEmbedding(embedder=FakeEmbedder(), dim=8)
    index = UniversalIndex(**server(tmp_path), embed_model=model)
    index.add(papers)
    assert index.embedder.name == "fake"
    assert index.collection.settings.dim == 8
    assert len(index.as_retriever().retrieve("wind")) == 2


def test_anything_else_is_no_embed_model(tmp_path):
    with pytest.raises(ConfigError, match="is a int"):
        UniversalIndex(tmp_path / "x", 3)


def test_remove_by_name_or_pattern(papers, tmp_path):
    index = UniversalIndex(**server(tmp_path), embed_model=FakeEmbedder())
    index.add(papers)
    assert index.remove("missing.txt") == []
    assert index.remove("a.txt") == [(papers / "a.txt").as_posix()]
    assert [Path(entry.file).name for entry in index.files()] == ["b.txt"]
    assert index.remove("papers/*") == [(papers / "b.txt").as_posix()]
    assert index.collection.count() == 0


def test_progress_is_a_bar_or_a_function(papers, tmp_path, capsys):
    index = UniversalIndex(**server(tmp_path), embed_model=FakeEmbedder())
    seen = []
    index.add([papers / "a.txt"], progress=seen.append)
    assert dataclasses.is_dataclass(seen[-1]) and isinstance(seen[-1], Progress)
    assert capsys.readouterr() == ("", "")
    index.add(papers, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err and "b.txt" in err


def test_closing_releases_the_folder(library):
    index = UniversalIndex(library)
    index.close()
    Collection.open(library).close()


def test_after_warming_up_the_fields_of_all_points_are_kept(library, tmp_path):
    with UniversalIndex(library, FakeEmbedder()) as index:
        index.warm_up()
        index.collection._ahead.join()
        assert len(index.collection._engine._kept(PAGE_FIELDS)) == index.collection.count_points()
    with pytest.raises(MissingCollectionError):
        UniversalIndex(tmp_path / "none", FakeEmbedder()).warm_up()


def test_warming_up_reads_nothing_of_a_server(papers, tmp_path, caplog):
    index = UniversalIndex(**server(tmp_path), embed_model=FakeEmbedder())
    index.add(papers)
    index.warm_up()
    index.collection._ahead.join()
    assert not caplog.records


def test_closing_ends_warming_up(library, monkeypatch, caplog):
    going = threading.Event()

    def endless(self, fields):
        while True:
            going.set()
            yield

    monkeypatch.setattr(EdgeEngine, "read_ahead", endless)
    index = UniversalIndex(library, FakeEmbedder())
    index.warm_up()
    assert going.wait(20)
    thread = index.collection._ahead._thread
    index.close()
    assert not thread.is_alive()
    assert not caplog.records
    Collection.open(library).close()


def test_the_collection_is_opened_once(library, monkeypatch):
    """Also by an index that was there before the collection: a second opening would be locked."""
    early = UniversalIndex(library.parent / "late", FakeEmbedder())
    library.rename(library.parent / "late")
    assert early.collection is early.collection
    early.close()


def test_an_empty_collection_says_so(tmp_path):
    (tmp_path / "papers").mkdir()
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.add(tmp_path / "papers")
        with pytest.raises(MissingCollectionError, match="empty"):
            index.as_retriever()


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_that_came_with_a_collection_is_not_loaded(papers, tmp_path, monkeypatch, inside):
    """Neither from the collection's folder, nor from a path that depends on where one works."""
    monkeypatch.setattr(mmrag.embedders, "load_embedder", lambda *_, **__: pytest.fail("loaded"))
    place = tmp_path / "library"
    name = str(place / "images" / "model") if inside else "model"
    with UniversalIndex(place, FakeEmbedder(name)) as index:
        index.add(papers)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with UniversalIndex(place) as index, pytest.raises(CollectionError, match="If you trust"):
        index.as_retriever()
    with UniversalIndex(place, FakeEmbedder(name)) as index:
        assert len(index.as_retriever().retrieve("wind")) == 2


def test_nothing_is_downloaded_for_a_collection(papers, tmp_path):
    with UniversalIndex(tmp_path / "library", FakeEmbedder("nobody/no-model")) as index:
        index.add(papers)
    with (
        UniversalIndex(tmp_path / "library") as index,
        pytest.raises(ModelError, match=r"not on this machine.*--embedder nobody/no-model"),
    ):
        index.as_retriever()


def test_unchanged_files_load_no_embedder(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("A plan that covers glasses and the examination of eyes.")
    with UniversalIndex(tmp_path / "c", FakeEmbedder()) as index:
        index.add(tmp_path / "a.md")
    loaded = []

    def load(name, **_):
        loaded.append(name)
        return FakeEmbedder()

    monkeypatch.setattr("mmrag.embedders.load_embedder", load)
    with UniversalIndex(tmp_path / "c") as index:
        assert index.add(tmp_path / "a.md").unchanged
        assert loaded == []
        (tmp_path / "b.md").write_text("A plan that covers teeth and the cleaning of them.")
        assert index.add(tmp_path / "b.md").indexed
        assert loaded == ["fake"]


@pytest.fixture
def model(monkeypatch):
    """A language model in LlamaIndex's settings."""
    scripted = Scripted(["Eye exams are covered by the plus plan [1]."])
    monkeypatch.setattr(Settings, "_llm", scripted)
    return scripted


def test_the_model_of_the_settings_answers_and_is_named(library, model, caplog):
    with UniversalIndex(library, FakeEmbedder()) as index, caplog.at_level(logging.INFO):
        answer = index.as_query_engine().query("What covers eye exams?")
    assert not answer.extractive and str(answer).endswith("[1].")
    assert "Settings.llm, scripted" in caplog.text


def test_without_a_model_in_the_settings_none_is_made(library, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-paid")
    with UniversalIndex(library, FakeEmbedder()) as index:
        assert index.as_query_engine().query("What covers eye exams?").extractive
        assert Settings._llm is None
        with pytest.raises(ConfigError, match=r"pass llm=.*Settings\.llm"):
            index.as_chat_engine()


def test_a_conversation_cites_pages(library, model):
    with UniversalIndex(library, FakeEmbedder()) as index:
        chat = index.as_chat_engine("condense_question", similarity_top_k=1)
        turn = chat.chat("What covers eye exams?")
        assert turn.cited.sources[0].file.endswith("b.txt")
        with pytest.raises(ConfigError, match="'context' is not one of ours"):
            index.as_chat_engine("context", model)
