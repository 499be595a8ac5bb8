"""The collection over both engines: nodes in, nodes out."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge as edge
from fakes import FakeEmbedder, make_image, make_node
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import ImageNode, Node, NodeWithScore, TextNode
from qdrant_client import QdrantClient, models

from mmrag.answering.context import Source
from mmrag.errors import CollectionError, ConfigError, MissingCollectionError
from mmrag.nodes import node_image, node_text
from mmrag.queries import Where
from mmrag.store import making
from mmrag.store.collection import Collection, CollectionSettings, FileEntry
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import AnyOf, Filter
from mmrag.store.matching import matching_paths
from mmrag.store.terms import DocumentTerms

EMBEDDER = FakeEmbedder()
SETTINGS = CollectionSettings("fake", EMBEDDER.fingerprint, 32, reading={"dpi": 144})
A, B = "a" * 64, "b" * 64


class Home:
    """A place for a collection that can be opened again and again."""

    def __init__(self, kind, folder):
        self.location = folder / "library" if kind == "edge" else QdrantClient(":memory:")
        self.images = None if kind == "edge" else folder / "pictures"

    def open(self, settings=SETTINGS, **options):
        return Collection.open(self.location, settings=settings, images_dir=self.images, **options)

    def upgrade(self):
        return Collection.upgrade(self.location, images_dir=self.images)


@pytest.fixture(params=["edge", "server"])
def home(request, tmp_path):
    return Home(request.param, tmp_path)


@pytest.fixture
def collection(home):
    with home.open() as opened:
        yield opened


@pytest.fixture(scope="module", params=["edge", "server"])
def sampled(request, tmp_path_factory):
    """A collection with the sample in it, to read from only."""
    with Home(request.param, tmp_path_factory.mktemp("sampled")).open() as opened:
        sample(opened)
        yield opened


def text_vector(text):
    return EMBEDDER.encode([text])[0]


def store(collection, *nodes):
    vectors = [{"text": text_vector(node_text(node))} if node_text(node) else {} for node in nodes]
    collection.write(nodes, vectors)


def sample(collection):
    """Two files: three pages and a passage."""
    nodes = [
        make_node("engines of aircraft", file="in/a.pdf", sha256=A, page=1, section="Power"),
        make_node("eye exams and glasses", file="in/a.pdf", sha256=A, page=2),
        make_node("glasses are covered", file="in/a.pdf", sha256=A, page=2, kind="passage"),
        make_node("wings and engines", file="in/b.pdf", sha256=B, page=7, year=2024, tags=["x"]),
    ]
    store(collection, *nodes)
    collection.mark_done(FileEntry("in/a.pdf", A, 2, 3, ("page 3 is broken",)))
    collection.mark_done(FileEntry("in/b.pdf", B, 1, 1))
    return nodes


def texts(hits):
    return [hit.payload["text"] for hit in hits]


def test_search_finds_the_nearest_node(sampled):
    sample(sampled)
    hits = sampled.search("text", text_vector("glasses are covered"), 2)
    assert texts(hits)[0] == "glasses are covered"
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert len(hits) == 2
    assert sampled.search("image", text_vector("glasses"), 5) == []


def test_search_text_ranks_the_text_and_never_bookkeeping(sampled):
    sample(sampled)
    found = texts(sampled.search_text("an aircraft's engine", 5))
    assert found == ["engines of aircraft", "wings and engines"]
    assert sampled.search_text("broken fake", 5) == []
    assert sampled.search_text("   ", 5) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Where(), 4),
        (Where(files=("in/a.pdf",)), 3),
        (Where(files=("a.pdf",)), 3),
        (Where(files=("*.pdf",)), 4),
        (Where(files=("in/b*", "missing.pdf")), 1),
        (Where(files=("missing.pdf",)), 0),
        (Where(pages=(2, None)), 3),
        (Where(pages=(None, 1)), 1),
        (Where(pages=(2, 2), kinds=("passage",)), 1),
        (Where(kinds=("page", "passage")), 4),
        (Where(metadata={"year": 2024}), 1),
        (Where(metadata={"section": "Power"}), 1),
        (Where(metadata={"section": ["Power", "Wings"], "page": 1}), 1),
        (Where(metadata={"tags": "x"}), 1),
        (Where(metadata={"nothing": "here"}), 0),
    ],
)
def test_where(sampled, where, expected):
    sample(sampled)
    assert sampled.count(where) == expected
    assert len(sampled.search("text", text_vector("engines"), 10, where)) == expected


def test_where_applies_to_bm25(sampled):
    sample(sampled)
    found = sampled.search_text("engines", 5, Where(files=("b.pdf",)))
    assert texts(found) == ["wings and engines"]
    assert sampled.search_text("engines", 5, Where(files=("missing.pdf",))) == []


@pytest.mark.parametrize("value", [None, {"a": 1}, [], [None]])
def test_where_refuses_what_cannot_be_matched(sampled, value):
    with pytest.raises(ConfigError, match="key"):
        sampled.count(Where(metadata={"key": value}))


def test_patterns_match_from_the_right():
    paths = ["x/a.pdf", "x/y/a.pdf", "x/[1].pdf"]
    assert matching_paths(["a.pdf"], paths) == paths[:2]
    assert matching_paths(["y/*.pdf"], paths) == [paths[1]]
    assert matching_paths(["x/[1].pdf"], paths) == [paths[2]]
    assert matching_paths(["[1].pdf"], paths) == [paths[2]]
    assert matching_paths(["./x/a.pdf"], paths) == [paths[0]]
    assert matching_paths(["", ".", "./", "/"], paths) == []


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    for place in ("/proc/mmrag", tmp_path / "file" / "below"):
        with pytest.raises(CollectionError, match="can be written"):
            Collection.open(place, settings=SETTINGS)


def test_nodes_come_back_with_text_image_and_metadata(collection):
    image = make_image(collection.images_dir / "p" / "page.png")
    page = make_node(
        "a page", image=image, page_image=image.as_posix(), box=[1.5, 2, 3, 4], sha256=A
    )
    passage = make_node("a passage", kind="passage", page_image=image.as_posix(), sha256=A)
    blank = make_node("", kind="figure", image=image, sha256=A)
    store(collection, page, passage, blank)
    back = {
        p.id: collection.node(p.payload)
        for p in collection._engine.retrieve([page.node_id, passage.node_id, blank.node_id])
    }
    for node, kind in ((page, Node), (passage, TextNode), (blank, Node)):
        stored = back[node.node_id]
        assert type(stored) is kind
        del stored.metadata["file_path"]
        stored.excluded_llm_metadata_keys.remove("file_path")
        stored.excluded_embed_metadata_keys.remove("file_path")
        assert stored == node
        assert stored.ref_doc_id == node.ref_doc_id
    assert node_image(back[page.node_id]) == image
    assert back[page.node_id].get_content_blocks()[-1].path == image


def test_text_and_image_of_any_node():
    assert node_text(TextNode(text="a")) == "a"
    assert node_text(ImageNode(text="b")) == "b"
    assert node_text(Node()) == ""
    assert node_image(TextNode(text="a")) is None


def test_writing_again_replaces(collection):
    store(collection, make_node("old words", sha256=A))
    store(collection, make_node("new words", sha256=A))
    assert collection.count() == 1
    assert texts(collection.search_text("words", 5)) == ["new words"]


def test_a_node_may_have_any_views(home):
    settings = dataclasses.replace(SETTINGS, views=("image", "text", "fused"))
    with home.open(settings) as collection:
        node, bare = make_node("one"), make_node("two", page=2)
        one, two = text_vector("one"), text_vector("two")
        collection.write([node, bare], [{"text": one, "fused": two}, {}])
        assert texts(collection.search("fused", two, 5)) == ["one"]
        assert collection.count() == 2


def test_vectors_that_do_not_fit_are_refused(sampled):
    node = make_node("one")
    with pytest.raises(ConfigError, match=r"\(3,\).*32 dimensions.*fake"):
        sampled.write([node], [{"text": np.ones(3)}])
    with pytest.raises(ConfigError, match=r"no view.*fused"):
        sampled.write([node], [{"fused": np.ones(32)}])
    with pytest.raises(ConfigError, match="NaN"):
        sampled.write([node], [{"text": np.full(32, np.nan)}])
    with pytest.raises(ConfigError, match="no view 'fused'"):
        sampled.search("fused", np.ones(32), 1)
    with pytest.raises(ConfigError, match="dimensions"):
        sampled.search("text", np.ones(31), 1)
    assert sampled.count() == 4


def test_files_and_counts(collection):
    nodes = sample(collection)
    assert collection.files() == [
        FileEntry("in/a.pdf", A, 2, 3, ("page 3 is broken",)),
        FileEntry("in/b.pdf", B, 1, 1),
    ]
    assert collection.count() == 4
    assert collection.existing([nodes[0].node_id, make_node(page=99).node_id]) == {nodes[0].node_id}


def test_a_file_is_unfinished_until_its_point_is_there(collection):
    store(collection, make_node("half", file="in/half.pdf", sha256=B))
    assert collection.files() == []
    assert collection.unfinished() == {B: "in/half.pdf"}
    assert collection.paths() == ["in/half.pdf"]
    collection.mark_done(FileEntry("in/half.pdf", B, 1, 1))
    assert collection.unfinished() == {}


@pytest.mark.parametrize("by", ["in/a.pdf", A])
def test_removing_a_file_takes_its_nodes_and_images(collection, by):
    sample(collection)
    image = make_image(collection.images_dir / "a" / "p.png")
    beside = make_image(collection.images_dir / A[:16] / "not-named-by-any-node.png")
    other = make_image(collection.images_dir / B[:16] / "p.png")
    store(collection, make_node("seen", file="in/a.pdf", sha256=A, page=9, image=image))
    assert collection.remove_file(by) == 4
    assert [entry.file for entry in collection.files()] == ["in/b.pdf"]
    assert collection.count() == 1
    assert not image.parent.exists() and not beside.parent.exists()
    assert other.exists()
    assert collection.remove_file(by) == 0


def test_a_removal_cut_short_leaves_no_finished_file(collection, monkeypatch):
    sample(collection)
    deleted = []

    def delete_once(where):
        if deleted:
            raise KeyboardInterrupt
        deleted.append(where)
        collection._engine.__class__.delete(collection._engine, where)

    monkeypatch.setattr(collection._engine, "delete", delete_once)
    with pytest.raises(KeyboardInterrupt):
        collection.remove_file("in/a.pdf")
    assert [entry.file for entry in collection.files()] == ["in/b.pdf"]
    assert collection.unfinished() == {A: "in/a.pdf"}


def test_moving_a_file_keeps_its_vectors(collection):
    sample(collection)
    entry = collection.files()[0]
    collection.move_file(entry, "out/z.pdf")
    assert [entry.file for entry in collection.files()] == ["in/b.pdf", "out/z.pdf"]
    hit = collection.search("text", text_vector("eye exams and glasses"), 1)[0]
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert collection.node(hit.payload).metadata["file"] == "out/z.pdf"
    assert collection.count(Where(files=("z.pdf",))) == 3


def test_moving_a_file_keeps_its_images(collection, tmp_path, monkeypatch):
    image = make_image(collection.images_dir / A[:16] / "p.png")
    node = make_node("seen", file="in/a.pdf", sha256=A, image=image, page_image=image.as_posix())
    store(collection, node)
    entry = FileEntry("in/a.pdf", A, 1, 1)
    collection.mark_done(entry)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    collection.move_file(entry, "in/z.pdf")
    (hit,) = collection.search_text("seen", 1)
    moved = collection.node(hit.payload)
    assert node_image(moved) == image
    assert moved.metadata["page_image"] == image.as_posix()
    collection.remove_file("in/z.pdf")
    assert not image.exists()


def test_a_file_is_found_from_any_working_directory(collection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(collection, make_node("near", file="in/a.pdf", sha256=A))
    monkeypatch.chdir("/")
    (hit,) = collection.search_text("near", 1)
    node = collection.node(hit.payload)
    assert node.metadata["file"] == "in/a.pdf"
    assert Path(node.metadata["file_path"]) == tmp_path / "in/a.pdf"
    assert "file_path" not in node.get_content("llm") + node.get_content("embed")


def test_points_of_a_collection_that_kept_no_folder(collection, tmp_path, monkeypatch):
    """As mmrag 0.1 wrote them: paths are taken from the working directory of the moment."""
    store(collection, make_node("wings", file="in/a.pdf", sha256=A))
    collection.mark_done(FileEntry("in/a.pdf", A, 1, 1, folder=str(tmp_path)))
    engine = collection._engine
    younger = ("folder", "complete")
    points = list(engine.scroll(Filter(), vectors=True))
    engine.delete(Filter(must_not=(AnyOf("kind", ("settings",)),)))
    for point in points:
        payload = {key: value for key, value in point.payload.items() if key not in younger}
        engine.upsert([dataclasses.replace(point, payload=payload)])
    monkeypatch.chdir(tmp_path)
    (entry,) = collection.files()
    assert (entry.folder, entry.complete, entry.path) == ("", True, tmp_path / "in" / "a.pdf")
    (node,) = collection.file_nodes(A)
    assert Source(1, "in/a.pdf", 1, NodeWithScore(node=node), "").path == Path("in/a.pdf")
    moved = collection.move_file(entry, "in/b.pdf")
    assert moved.folder == str(tmp_path)
    (node,) = collection.file_nodes(A)
    monkeypatch.chdir("/")
    path = Source(1, "in/b.pdf", 1, NodeWithScore(node=node), "").path
    assert path == tmp_path / "in" / "b.pdf"
    assert not collection.examine().damaged


def test_file_names_match_however_their_accents_are_written(collection):
    decomposed = unicodedata.normalize("NFD", "docs/Übersicht Gebühren.md")
    store(collection, make_node("fees", file=decomposed, sha256=A))
    for pattern in ("Übersicht Gebühren.md", "Über*"):
        assert collection.count(Where(files=(pattern,))) == 1
        assert matching_paths([pattern], collection.paths()) == [decomposed]


def test_patterns_that_match_nothing_are_named(sampled):
    sample(sampled)
    assert sampled.unmatched(Where(files=("a.pdf", "nope*"))) == ["nope*"]
    assert sampled.unmatched(Where()) == sampled.unmatched(None) == []


def astray(collection, stored):
    """Give a stored node image paths as somebody else may have written them."""
    image = make_image(collection.images_dir / A[:16] / "p.png")
    node = make_node("seen", file="in/a.pdf", sha256=A, image=image, page_image=image.as_posix())
    store(collection, node)
    (point,) = collection._engine.scroll(Filter(must=(AnyOf("kind", ("page",)),)), vectors=True)
    text = json.dumps(point.payload)
    for path in {collection._images.stored(image, node.node_id).as_posix(), image.as_posix()}:
        text = text.replace(path, stored)
    collection._engine.upsert([dataclasses.replace(point, payload=json.loads(text))])


@pytest.mark.parametrize("path", ["images/../../secret.png", "{outside}", "images/link/p.png"])
def test_images_outside_of_the_collection_are_neither_read_nor_deleted(
    collection, tmp_path, path, caplog
):
    secret = make_image(tmp_path / "secret.png")
    if "link" in path:
        secret = make_image(tmp_path / "outside" / "p.png")
        (collection.images_dir / "link").symlink_to(secret.parent)
    astray(collection, path.format(outside=secret))
    (hit,) = collection.search_text("seen", 1)
    node = collection.node(hit.payload)
    assert node_image(node) is None
    assert "page_image" not in node.metadata
    assert "are not used" in caplog.text
    collection.remove_file("in/a.pdf")
    assert secret.exists()


def test_an_image_from_elsewhere_is_copied(collection, tmp_path):
    mine = make_image(tmp_path / "mine.png")
    store(collection, make_node("seen", file="in/a.pdf", sha256=A, image=mine))
    (hit,) = collection.search_text("seen", 1)
    copy = node_image(collection.node(hit.payload))
    assert copy.is_relative_to(collection.images_dir)
    assert copy.read_bytes() == mine.read_bytes()
    collection.remove_file("in/a.pdf")
    assert mine.exists() and not copy.parent.exists()


def test_a_link_among_the_images_is_not_followed(collection, tmp_path):
    link = collection.images_dir / "p.png"
    link.symlink_to(make_image(tmp_path / "secret.png"))
    with pytest.raises(CollectionError, match="is a link"):
        store(collection, make_node("seen", image=link))


def test_a_folder_of_images_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "precious").mkdir()
    Collection.open(tmp_path / "x", settings=SETTINGS).close()
    images = tmp_path / "x" / "images"
    (images / ("a" * 16)).symlink_to(tmp_path / "precious")
    with pytest.raises(CollectionError, match="holds links"):
        Collection.open(tmp_path / "x")
    shutil.rmtree(images)
    images.symlink_to(tmp_path / "precious")
    with pytest.raises(CollectionError, match="images_dir"):
        Collection.open(tmp_path / "x")
    Collection.open(tmp_path / "x", images_dir=tmp_path / "precious").close()


def test_it_remembers_what_built_it(home):
    settings = CollectionSettings("m", "f", 8, ("text",), {"dpi": 99}, "german")
    home.open(settings).close()
    with home.open(None) as again:
        assert again.settings == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedder": "other", "fingerprint": "x"}, r"'fake', not by 'other'.*another collection"),
        ({"fingerprint": "x"}, r"another version of 'fake'.*another collection"),
        ({"dim": 16}, r"dim: 32, not 16"),
        ({"views": ("text",)}, r"views: .*image.*not \['text'\]"),
        ({"reading": {"dpi": 72}}, r"reading: .*144.*not .*72"),
        ({"language": "german"}, r"language: 'auto', not 'german'"),
    ],
)
def test_it_refuses_what_did_not_build_it(tmp_path, change, message):
    home = Home("server", tmp_path)
    home.open().close()
    with pytest.raises(CollectionError, match=message):
        home.open(dataclasses.replace(SETTINGS, **change))


def test_a_refused_folder_is_released(tmp_path):
    home = Home("edge", tmp_path)
    home.open().close()
    with pytest.raises(CollectionError, match="not by 'other'"):
        home.open(dataclasses.replace(SETTINGS, embedder="other", fingerprint="x"))
    home.open().close()


def test_the_same_model_under_another_name_is_welcome(home):
    home.open().close()
    home.open(dataclasses.replace(SETTINGS, embedder="/models/fake")).close()


def test_a_newer_schema_is_refused(home, monkeypatch):
    monkeypatch.setattr(making, "SCHEMA_VERSION", 99)
    home.open().close()
    monkeypatch.undo()
    with pytest.raises(CollectionError, match=r"newer mmrag.*pip install -U"):
        home.open(None)


def downgrade(collection, language="english"):
    """Leave the points as schema 1 had them."""
    engine = collection._engine
    old = []
    for point in engine.scroll(Filter(), vectors=True):
        payload = {k: v for k, v in point.payload.items() if not k.startswith("terms")}
        if payload["kind"] == "settings":
            payload |= {"schema": 1, "settings": payload["settings"] | {"language": language}}
        old.append(dataclasses.replace(point, payload=payload))
    engine.drop_index("terms")
    engine.upsert(old)
    if isinstance(engine, EdgeEngine):
        engine._open.update(
            edge.UpdateOperation.delete_payload_by_filter(edge.Filter(), ["checksum"])
        )


def everything(collection):
    """Payload and vectors of every point; local mode normalises vectors once more."""
    return {
        point.id: (point.payload, {name: v.round(5).tolist() for name, v in point.vectors.items()})
        for point in collection._engine.scroll(Filter(), vectors=True)
    }


def test_an_older_schema_is_refused_and_upgraded_without_embedding(home):
    german = "Die Züge der Bahn fahren jeden Tag, und die Häuser an der Strecke sind bewohnt."
    with home.open() as collection:
        document = DocumentTerms("Bahn_2024.pdf")
        for page, text in enumerate((german, "Umsatz 1.577,00"), start=1):
            node = make_node(text, file="Bahn_2024.pdf", sha256=A, page=page)
            document.read(text)
            collection.write([node], [{"text": text_vector(text)}], [document.of(text)])
        collection.mark_done(FileEntry("Bahn_2024.pdf", A, 2, 2))
        before = everything(collection)
        downgrade(collection)
    with pytest.raises(CollectionError, match=r"older mmrag.*mmrag upgrade -c.*embedded again"):
        home.open(None)
    assert home.upgrade() == 2
    assert home.upgrade() == 0
    with home.open() as collection:
        assert everything(collection) == before
        assert not collection.examine().damaged
        assert texts(collection.search_text("zug bahn haus", 1)) == [german]


def test_nothing_there(home):
    with pytest.raises(MissingCollectionError, match="ndex something"):
        home.open(None)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="views"):
        dataclasses.replace(SETTINGS, views=("sound",))
    with pytest.raises(ConfigError, match="dim=0"):
        dataclasses.replace(SETTINGS, dim=0)
    with pytest.raises(ConfigError, match="klingon"):
        dataclasses.replace(SETTINGS, language="klingon")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.pdf").write_bytes(b"%PDF")
    with pytest.raises(CollectionError, match=r"thesis.pdf.*empty or new folder"):
        Collection.open(tmp_path, settings=SETTINGS)
    with pytest.raises(CollectionError, match="is a file"):
        Collection.open(tmp_path / "thesis.pdf", settings=SETTINGS)
    with pytest.raises(ConfigError, match="http"):
        Collection.open("ftp://host", settings=SETTINGS)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.pdf"]


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    with Collection.open(tmp_path / "x", settings=SETTINGS):
        code = (
            "import sys; from mmrag.store.collection import Collection\n"
            "try: Collection.open(sys.argv[1])\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True
        )
    assert "CollectionError" in run.stdout
    assert "another process" in run.stdout


def test_many_processes_may_open_a_new_folder_at_once(tmp_path):
    """One at a time gets it, whenever they come; nobody damages it for the others."""
    code = """
import sys
from fakes import make_node
from mmrag.errors import CollectionError
from mmrag.store.collection import Collection, CollectionSettings
try:
    settings = CollectionSettings("fake", "1", 32)
    with Collection.open(sys.argv[1], settings=settings) as collection:
        collection.write([make_node("one")], [{}])
    print("opened")
except CollectionError as error:
    print("in use" if "in use by another process" in str(error) else error)
"""
    paths = os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "x")],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate()[0].strip() for process in processes]
    assert set(said) <= {"opened", "in use"}
    assert "opened" in said
    with Collection.open(tmp_path / "x") as collection:
        assert collection.count() == 1


def test_a_forked_process_is_told_and_leaves_the_collection_to_its_parent(tmp_path):
    with Collection.open(tmp_path / "x", settings=SETTINGS) as collection:
        sample(collection)
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(20)
            try:
                collection.count()
            except CollectionError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                collection.close()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(CollectionError, match="in use"):
            Collection.open(tmp_path / "x")
        assert collection.count() == 4


def test_a_collection_cut_short_at_birth_is_finished(tmp_path):
    """Killed after the shard was made, before the settings were written."""
    from mmrag.store.edge import EdgeEngine
    from mmrag.store.making import schema_of

    (tmp_path / "x").mkdir()
    EdgeEngine(tmp_path / "x" / "qdrant", schema_of(SETTINGS)).close()
    with pytest.raises(MissingCollectionError):
        Collection.open(tmp_path / "x")
    with Collection.open(tmp_path / "x", settings=SETTINGS) as collection:
        assert collection.settings == SETTINGS


def test_a_collection_of_another_program_is_left_alone():
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=4, distance=models.Distance.COSINE)
    client.create_collection("empty", vectors_config=params)
    client.create_collection("full", vectors_config=params)
    client.upsert("full", [models.PointStruct(id=1, vector=[1, 0, 0, 0], payload={})])
    for name in ("empty", "full"):
        with pytest.raises(CollectionError, match="not made by mmrag"):
            Collection.open(client, settings=SETTINGS, name=name)


def test_a_moved_folder_keeps_its_images(tmp_path):
    with Collection.open(tmp_path / "old", settings=SETTINGS) as collection:
        image = make_image(collection.images_dir / "p.png")
        store(collection, make_node("page", image=image, page_image=image.as_posix()))
    shutil.move(tmp_path / "old", tmp_path / "new")
    with Collection.open(tmp_path / "new") as collection:
        (hit,) = collection.search_text("page", 1)
        node = collection.node(hit.payload)
    assert node_image(node) == tmp_path / "new" / "images" / "p.png"
    assert Path(node.metadata["page_image"]).is_file()


def test_payload_has_what_filters_and_bm25_need(collection):
    node = make_node("words", section="One")
    store(collection, node)
    (hit,) = collection.search_text("words", 1)
    expected = {"text": "words", "file": "a.pdf", "page": 1, "kind": "page", "section": "One"}
    assert expected.items() <= hit.payload.items()
    assert hit.payload["doc_id"] == node.ref_doc_id
    assert hit.payload["_node_type"] == "TextNode"
    assert hit.payload["terms_language"] == "english"
    assert "terms" not in hit.payload


class LlamaEmbedding:
    """The fake as a LlamaIndex embed model."""

    def __new__(cls):
        from llama_index.core.embeddings import MockEmbedding

        class Model(MockEmbedding):
            def _get_query_embedding(self, query):
                return text_vector(query).tolist()

        return Model(embed_dim=32)


def test_llama_index_reads_it_through_its_own_vector_store(tmp_path):
    client = QdrantClient(":memory:")
    with Collection.open(client, settings=SETTINGS, images_dir=tmp_path / "p") as collection:
        image = make_image(collection.images_dir / "p.png")
        sample(collection)
        store(collection, make_node("a photograph", sha256=B, page=3, image=image))
        vector_store = collection.as_llama_vector_store("text")
        index = VectorStoreIndex.from_vector_store(vector_store, embed_model=LlamaEmbedding())
        hits = index.as_retriever(similarity_top_k=9).retrieve("a photograph")
        assert len(hits) == 5
        assert type(hits[0].node) is Node
        assert hits[0].node.text_resource.text == "a photograph"
        assert node_image(hits[0].node) == image
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        vector_store.delete(hits[0].node.ref_doc_id)
        assert collection.count() == 3


def test_llama_vector_store_needs_a_server(tmp_path):
    with (
        Collection.open(tmp_path / "x", settings=SETTINGS) as collection,
        pytest.raises(CollectionError, match="server"),
    ):
        collection.as_llama_vector_store()
