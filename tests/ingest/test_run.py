"""Files into the collection: what is embedded, when, and what becomes of it."""

import shutil
import threading
import time
from pathlib import Path

import kill_restart
import numpy as np
import pymupdf
import pytest
from fakes import FakeEmbedder, make_image
from PIL import Image
from qdrant_client import QdrantClient

from mmrag.errors import CollectionError, EndpointError, ReadError
from mmrag.ingest import run as module
from mmrag.ingest.plan import make_plan
from mmrag.ingest.prefetch import THREAD_NAME
from mmrag.ingest.progress import IngestReport
from mmrag.ingest.run import ingest, reading_settings
from mmrag.ingest.writer import Writer
from mmrag.queries import Where
from mmrag.reading import ReadOptions, ReadPage
from mmrag.store.collection import Collection, CollectionSettings, FileEntry
from mmrag.store.engine import Filter, Within

OPTIONS = ReadOptions(dpi=50, passage_words=20, passage_overlap=0)


def open_collection(folder, embedder, **settings):
    known = {"reading": reading_settings(OPTIONS), "dim": embedder.dim, **settings}
    return Collection.open(
        QdrantClient(":memory:"),
        settings=CollectionSettings(embedder.name, embedder.fingerprint, **known),
        images_dir=folder / "images",
    )


@pytest.fixture
def embedder():
    return FakeEmbedder()


@pytest.fixture
def collection(tmp_path, embedder):
    with open_collection(tmp_path, embedder) as opened:
        yield opened


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder ``in`` with three texts; the working directory is the one above it."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "three"):
        write(f"in/{name}.txt", f"the words of file {name}")
    return tmp_path / "in"


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def long_text(name, paragraphs):
    return "\n\n".join(f"{name} paragraph {n} " + "word " * 15 for n in range(paragraphs))


def content(collection):
    return {
        point.id: (point.payload, {name: v.tobytes() for name, v in point.vectors.items()})
        for point in collection._engine.scroll(Filter(), vectors=True)
    }


def found(collection, query):
    return [hit.payload["file"] for hit in collection.search_text(query, 10)]


def test_files_of_every_kind(tmp_path, embedder, collection, files):
    make_image(files / "photo.png", size=(40, 30))
    pdf = pymupdf.open()
    pdf.new_page().insert_text((72, 72), "a page about turbines")
    pdf.new_page()
    pdf.save(files / "paper.pdf")
    report = ingest(["in"], collection, embedder)
    assert sorted(report.indexed) == sorted(path.as_posix() for path in Path("in").iterdir())
    assert (report.pages, report.nodes) == (6, 6)
    assert not report.errors and not report.failed and not report.notes
    points = {
        (p.payload["file"], p.payload.get("page")): p
        for p in collection._engine.scroll(Filter(), vectors=True)
        if p.payload["kind"] not in ("file", "settings")
    }
    views = {key: set(point.vectors) for key, point in points.items()}
    assert views == {
        ("in/one.txt", None): {"text"},
        ("in/two.txt", None): {"text"},
        ("in/three.txt", None): {"text"},
        ("in/paper.pdf", 1): {"image", "text"},
        ("in/paper.pdf", 2): {"image"},
        ("in/photo.png", 1): {"image"},
    }
    expected = embedder.encode(["a page about turbines"])[0]
    np.testing.assert_allclose(points["in/paper.pdf", 1].vectors["text"], expected, atol=1e-6)
    entries = {entry.file: (entry.pages, entry.nodes) for entry in collection.files()}
    assert entries["in/paper.pdf"] == (2, 2)


def test_a_second_run_embeds_nothing(embedder, collection, files):
    ingest(["in"], collection, embedder)
    before, calls = content(collection), len(embedder.calls)
    (files / "one.txt").touch()
    report = ingest(["in"], collection, embedder)
    assert len(embedder.calls) == calls
    assert sorted(report.unchanged) == ["in/one.txt", "in/three.txt", "in/two.txt"]
    assert (report.pages, report.nodes, report.indexed) == (0, 0, [])
    assert content(collection) == before


def test_a_changed_file_alone_is_embedded_again(embedder, collection, files, monkeypatch):
    ingest(["in"], collection, embedder)
    count = embedder.encoded
    write("in/two.txt", "entirely fresh sentences")
    seen = []
    remove = collection.remove_file
    monkeypatch.setattr(
        collection,
        "remove_file",
        lambda sha256: seen.append(found(collection, "fresh words")) or remove(sha256),
    )
    report = ingest(["in"], collection, embedder)
    assert report.replaced == ["in/two.txt"]
    assert embedder.encoded == count + 1
    # While the old version was removed, both versions could be found.
    assert sorted(seen[0]) == ["in/one.txt", "in/three.txt", "in/two.txt", "in/two.txt"]
    assert found(collection, "fresh") == ["in/two.txt"]
    assert collection.count() == 3
    assert len(collection.files()) == 3


def test_prune_forgets_what_is_gone_from_the_folders_given(embedder, collection, files):
    write("other/far.txt", "far away")
    ingest(["in", "other"], collection, embedder)
    (files / "one.txt").unlink()
    Path("other/far.txt").unlink()
    assert ingest(["in"], collection, embedder).removed == []
    assert collection.count() == 4
    report = ingest(["in"], collection, embedder, prune=True)
    assert report.removed == ["in/one.txt"]
    assert sorted(e.file for e in collection.files()) == [
        "in/three.txt",
        "in/two.txt",
        "other/far.txt",
    ]


def test_the_same_content_twice_is_said_and_stored_once(embedder, collection, files):
    write("in/copy.txt", Path("in/one.txt").read_text())
    report = ingest(["in"], collection, embedder)
    assert report.duplicates == {"in/one.txt": "in/copy.txt"}
    assert report.notes == ["in/one.txt has the same content as in/copy.txt, which stands for it."]
    assert collection.count() == 3
    again = ingest(["in"], collection, embedder)
    assert again.duplicates == {"in/one.txt": "in/copy.txt"}
    assert embedder.encoded == 3


def test_a_copy_stands_in_for_a_file_that_fails(embedder, collection, files):
    """A PDF under a wrong suffix is refused; the same bytes under their own are not."""
    two_pages(files / "report.pdf", "turbines")
    for name in ("a-copy.txt", "b-copy.md"):
        shutil.copy(files / "report.pdf", files / name)
    report = ingest(["in"], collection, embedder)
    assert sorted(report.failed) == ["in/a-copy.txt", "in/b-copy.md"]
    assert "in/report.pdf" in report.indexed
    assert report.duplicates == {} and report.notes == []
    assert len(found(collection, "turbines")) == 2


def test_every_empty_file_is_called_empty(embedder, collection, files):
    for name in ("empty.txt", "zero.pdf"):
        write(f"in/{name}", "")
    report = ingest(["in"], collection, embedder)
    assert sorted(report.failed) == ["in/empty.txt", "in/zero.pdf"]
    assert all("is empty" in str(error) for error in report.errors)
    assert report.duplicates == {}


def test_progress_counts_copies_of_failed_files(embedder, collection, files):
    two_pages(files / "report.pdf", "turbines")
    shutil.copy(files / "report.pdf", files / "a-copy.txt")
    seen = []
    ingest(["in"], collection, embedder, progress=seen.append)
    assert (seen[-1].files_done, seen[-1].files_total) == (5, 5)


def test_files_of_other_types_are_named(embedder, collection, files):
    for name in ("a.odt", "b.ODT", "page.tex", "LICENSE", ".hidden.docx"):
        write(f"in/{name}", "not read")
    report = ingest(["in"], collection, embedder)
    assert report.notes == ["4 files of other types passed over: 2 .odt, 1 no suffix, 1 .tex"]
    assert report.passed_over == ["in/LICENSE", "in/a.odt", "in/b.ODT", "in/page.tex"]
    assert len(report.indexed) == 3 and not report.failed


def test_planning_asks_the_file_system_once_for_each_folder(
    embedder, collection, files, monkeypatch
):
    for number in range(40):
        collection.mark_done(FileEntry(f"in/old{number}.txt", f"{number:064x}", 1, 1))
    resolved = []
    resolve = Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda self: resolved.append(self) or resolve(self))
    assert len(make_plan(["in"], collection, IngestReport()).jobs) == 3
    assert len(resolved) <= 4


def test_what_stands_for_a_copy_is_unchanged_whatever_the_order(embedder, collection, files):
    ingest(["in"], collection, embedder)
    write("in/a.txt", Path("in/one.txt").read_text())
    report = ingest(["in"], collection, embedder)
    assert report.duplicates == {"in/a.txt": "in/one.txt"}
    assert report.unchanged == ["in/one.txt", "in/three.txt", "in/two.txt"]


def test_the_images_of_collections_are_not_indexed(tmp_path, embedder, files):
    """The default folder of a collection lies in the working directory, which may be indexed."""
    make_image(files / "photo.png", size=(40, 30))
    settings = {"reading": reading_settings(OPTIONS), "dim": embedder.dim}
    for name in ("library", "second"):
        known = CollectionSettings(embedder.name, embedder.fingerprint, **settings)
        for run in (1, 2):
            with Collection.open(Path(name), settings=known) as opened:
                report = ingest(["."], opened, embedder)
            assert len(report.indexed if run == 1 else report.unchanged) == 4
            assert not report.duplicates


def test_one_file_under_several_spellings_of_its_path(embedder, collection, files, tmp_path):
    ingest(["in"], collection, embedder)
    for spelling in (tmp_path / "in", "in/../in"):
        report = ingest([spelling], collection, embedder)
        assert len(report.unchanged) == 3 and not report.duplicates and not report.moved
    write("in/one.txt", "a second edition")
    report = ingest([tmp_path / "in"], collection, embedder)
    assert report.replaced == [(tmp_path / "in/one.txt").as_posix()]
    assert found(collection, "words") == ["in/three.txt", "in/two.txt"]


def test_equal_relative_paths_in_two_working_directories(
    embedder, collection, files, tmp_path, monkeypatch
):
    ingest(["in"], collection, embedder)
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    write("in/one.txt", "another text elsewhere")
    report = ingest([".", "in"], collection, embedder, prune=True)
    assert report.indexed == ["in/one.txt"] and not report.removed
    assert len(collection.files()) == 4


def test_a_working_directory_that_moved_with_its_files(
    embedder, collection, files, tmp_path, monkeypatch
):
    ingest(["in"], collection, embedder)
    (tmp_path / "far").mkdir()
    (tmp_path / "in").rename(tmp_path / "far/in")
    monkeypatch.chdir(tmp_path / "far")
    write("in/one.txt", "a second edition")
    report = ingest(["in"], collection, embedder)
    assert report.unchanged == ["in/three.txt", "in/two.txt"] and not report.moved
    assert report.replaced == ["in/one.txt"]
    Path("in/two.txt").unlink()
    assert ingest(["in"], collection, embedder, prune=True).removed == ["in/two.txt"]


def test_a_moved_file_is_not_embedded_again(embedder, collection, files):
    ingest(["in"], collection, embedder)
    count = embedder.encoded
    Path("in/one.txt").rename("in/renamed.txt")
    report = ingest(["in"], collection, embedder)
    assert report.moved == {"in/renamed.txt": "in/one.txt"}
    assert embedder.encoded == count
    assert found(collection, "one") == ["in/renamed.txt"]


def test_content_that_moves_while_its_path_gets_new_content(embedder, collection, files):
    ingest(["in"], collection, embedder)
    Path("in/one.txt").rename("in/archive.txt")
    write("in/one.txt", "a new edition")
    report = ingest(["in"], collection, embedder)
    assert report.moved == {"in/archive.txt": "in/one.txt"}
    assert report.indexed == ["in/one.txt"]
    assert found(collection, "words file one")[0] == "in/archive.txt"
    assert found(collection, "edition") == ["in/one.txt"]
    assert len(collection.files()) == 4


class Interrupting(FakeEmbedder):
    """Raises ``error`` instead of its n-th call."""

    def __init__(self, n, error):
        super().__init__()
        self.left = n
        self.error = error

    def encode(self, contents, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().encode(contents, *args, **kwargs)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, embedder, collection, files):
    write("in/long.txt", long_text("long", 100))
    with open_collection(tmp_path, embedder) as other:
        ingest(["in"], other, FakeEmbedder())
        expected = content(other)
    interrupted = Interrupting(3, EndpointError("the server is away"))
    with pytest.raises(EndpointError):
        ingest(["in"], collection, interrupted)
    stored = collection.count()
    # What was embedded behind the batch that failed is embedded again, and no more than that.
    assert 0 < stored <= interrupted.encoded <= stored + 3 * 32
    assert "in/long.txt" in collection.unfinished().values()
    ingest(["in"], collection, embedder)
    assert embedder.encoded == len(expected) - 5 - stored  # 4 files and the settings
    got = content(collection)
    assert {key: payload for key, (payload, _) in got.items()} == {
        key: payload for key, (payload, _) in expected.items()
    }
    for key, (_, vectors) in got.items():  # in the last bit, a vector depends on its batch
        for view, stored_bytes in vectors.items():
            ours, theirs = (
                np.frombuffer(b, np.float32) for b in (stored_bytes, expected[key][1][view])
            )
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_file_that_moves_after_its_run_was_cut_short(embedder, collection, files):
    write("in/long.txt", long_text("long", 100))
    with pytest.raises(EndpointError):
        ingest(["in"], collection, Interrupting(2, EndpointError("away")))
    Path("in/long.txt").rename("in/renamed.txt")
    ingest(["in"], collection, embedder)
    paths = {
        point.payload["file"]
        for point in collection._engine.scroll(Filter())
        if point.payload["kind"] != "settings"
    }
    assert paths == {f"in/{name}.txt" for name in ("one", "two", "three", "renamed")}


def test_what_a_cut_short_run_left_of_a_changed_file_goes(embedder, collection, files):
    write("in/long.txt", long_text("long", 100))
    write("gone/long.txt", long_text("gone", 100))
    for folder in ("in", "gone"):
        with pytest.raises(EndpointError):
            ingest([folder], collection, Interrupting(2, EndpointError("away")))
    assert len(collection.unfinished()) >= 2
    write("in/long.txt", "short now")
    Path("gone/long.txt").unlink()
    ingest(["in"], collection, embedder)
    assert collection.unfinished() == {}
    assert found(collection, "paragraph") == []
    assert found(collection, "short") == ["in/long.txt"]


def test_what_a_cut_short_run_left_elsewhere_stays(embedder, collection, files):
    write("far/long.txt", long_text("long", 100))
    with pytest.raises(EndpointError):
        ingest(["far"], collection, Interrupting(2, EndpointError("away")))
    ingest(["in"], collection, embedder)
    assert list(collection.unfinished().values()) == ["far/long.txt"]


class Crash(Exception):
    """Stands for the end of the process."""


def crash_at(engine, number):
    """Make the engine raise in place of its ``number``-th change; returns the count so far."""
    changes = []

    def counted(change):
        def act(*args):
            changes.append(change)
            if len(changes) == number:
                raise Crash
            return change(*args)

        return act

    engine.upsert, engine.delete = counted(engine.upsert), counted(engine.delete)
    return changes


def first_edition():
    write("in/changed.txt", long_text("old", 40))
    write("in/moved.txt", "this will move")
    write("in/gone.txt", "this will go")


def second_edition():
    write("in/changed.txt", long_text("new", 40))
    Path("in/moved.txt").rename("in/elsewhere.txt")
    write("in/moved.txt", "another text under the old name")
    Path("in/gone.txt").unlink()
    write("in/added.txt", "this is new")


def test_cut_short_at_any_change_the_next_run_ends_as_if_undisturbed(tmp_path, monkeypatch):
    """Changed, moved, removed and new files at once, a crash before each write and deletion."""

    def run(number):
        """Index both editions, crashing once; returns the changes made and what is stored."""
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with open_collection(tmp_path, FakeEmbedder()) as collection:
            first_edition()
            ingest(["in"], collection, FakeEmbedder())
            second_edition()
            engine = collection._engine
            upsert, delete = engine.upsert, engine.delete
            changes = crash_at(engine, number)
            try:
                ingest(["in"], collection, FakeEmbedder(), prune=True)
            except Crash:
                engine.upsert, engine.delete = upsert, delete
                ingest(["in"], collection, FakeEmbedder(), prune=True)
            return len(changes), content(collection)

    total, expected = run(0)
    assert total >= 10
    for number in range(1, total + 1):
        assert run(number)[1] == expected, f"differs after a crash at change {number}"


def test_one_item_that_cannot_be_embedded_is_reported(embedder, collection, files):
    text = long_text("mixed", 9) + "\n\nPOISON " + "bitter " * 15
    write("in/mixed.txt", text)
    report = ingest(["in"], collection, embedder)
    (error,) = report.errors
    assert error.file == "in/mixed.txt"
    assert "poisoned" in str(error) and "text view" in str(error)
    assert report.failed == []
    assert collection.files()[0].errors == (str(error),)
    everything = collection.search("text", embedder.encode(["x"])[0], 99)
    assert len(everything) == collection.count() - 1
    assert found(collection, "bitter") == ["in/mixed.txt"]


def test_broken_files_do_not_stop_the_rest(embedder, collection, files):
    write("in/broken.pdf", "%PDF-1.7 and then nothing")
    write("in/empty.txt", "")
    report = ingest(["in", "missing.pdf"], collection, embedder)
    assert sorted(report.failed) == ["in/broken.pdf", "in/empty.txt", "missing.pdf"]
    assert sorted({error.file for error in report.errors}) == sorted(report.failed)
    assert len(report.indexed) == 3
    assert len(collection.files()) == 3


def test_a_broken_new_version_leaves_the_old_one(embedder, collection, files):
    ingest(["in"], collection, embedder)
    write("in/one.txt", "")
    report = ingest(["in"], collection, embedder)
    assert report.failed == ["in/one.txt"]
    assert report.notes == ["in/one.txt: its earlier version stays in place."]
    assert "in/one.txt" in found(collection, "words")


def test_a_text_only_embedder(tmp_path, files):
    make_image(files / "photo.png")
    embedder = FakeEmbedder(modalities=("text",))
    with open_collection(tmp_path, embedder) as collection:
        report = ingest(["in"], collection, embedder)
        assert report.notes == ["fake embeds text only: nodes get no vectors for the view image."]
        assert not report.errors
        assert collection.count() == 4
        assert collection.search("image", embedder.encode(["x"])[0], 9) == []


def test_an_embedder_that_prefers_text_sees_images_only_where_there_is_none(tmp_path, files):
    embedder = FakeEmbedder()
    embedder.prefers_text = True
    pdf = pymupdf.open()
    pdf.new_page().insert_text((72, 72), "a page about turbines")
    pdf.new_page().draw_rect((72, 72, 500, 700), fill=(1, 0, 0))
    pdf.save(files / "mixed.pdf")
    with open_collection(tmp_path, embedder) as collection:
        ingest(["in/mixed.pdf"], collection, embedder)
        views = {
            point.payload["page"]: set(point.vectors)
            for point in collection._engine.scroll(Filter(), vectors=True)
            if point.payload["kind"] == "page"
        }
    assert views == {1: {"text"}, 2: {"image"}}


def test_an_embedder_that_prefers_passages_sees_long_pages_in_passages(tmp_path, files):
    embedder = FakeEmbedder()
    embedder.prefers_passages = True
    pdf = pymupdf.open()
    pdf.new_page().insert_text((72, 72), "a page about turbines")
    lines = [f"sentence {n} is about blades." for n in range(9)]
    pdf.new_page().insert_textbox((72, 72, 500, 700), " ".join(lines))
    pdf.save(files / "mixed.pdf")
    with open_collection(tmp_path, embedder) as collection:
        ingest(["in/mixed.pdf"], collection, embedder)
        views = {
            (point.payload["page"], point.payload["kind"]): set(point.vectors)
            for point in collection._engine.scroll(Filter(), vectors=True)
            if "page" in point.payload
        }
    assert views == {
        (1, "page"): {"image", "text"},
        (2, "page"): {"image"},
        (2, "passage"): {"text"},
    }


def test_fused_vectors_when_asked_and_truncated(tmp_path, embedder, files):
    pdf = pymupdf.open()
    pdf.new_page().insert_text((72, 72), "a page about turbines")
    pdf.save(files / "paper.pdf")
    views = ("text", "fused")
    with open_collection(tmp_path, embedder, views=views, dim=8) as collection:
        ingest([files / "paper.pdf"], collection, embedder)
        (point,) = [
            p
            for p in collection._engine.scroll(Filter(), vectors=True)
            if p.payload["kind"] == "page"
        ]
    assert {name: v.shape for name, v in point.vectors.items()} == dict.fromkeys(views, (8,))
    (fused,) = [c for call in embedder.calls for c in call if c.images and c.text]
    assert fused.text == "a page about turbines"


def test_what_did_not_build_the_collection_is_refused(embedder, collection, files):
    with pytest.raises(CollectionError, match=r"'fake'; 'other' cannot add"):
        ingest(["in"], collection, FakeEmbedder(name="other"))
    with pytest.raises(CollectionError, match="passage_words"):
        ingest(
            ["in"], collection, embedder, options=ReadOptions(passage_words=7, passage_overlap=0)
        )
    limits = ReadOptions(dpi=50, passage_words=20, passage_overlap=0, page_seconds=5)
    ingest(["in"], collection, embedder, options=limits)
    assert collection.count() == 3


def test_batches_go_across_files(embedder, collection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(70):
        write(f"many/{n}.txt", f"file number {n}")
    ingest(["many"], collection, embedder)
    assert sorted(len(call) for call in embedder.calls) == [4, 8, 10, 16, 32]


def test_the_model_waits_neither_for_the_database_nor_for_files(
    embedder, collection, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # Batches of 4, 8, 16, and five of 32 items. All are full: what is left over at the end is
    # handed on after the last file, when the batch before it may be stored already.
    ends = [4, 12, 28, 60, 92, 124, 156, 188]
    for n in range(ends[-1]):
        write(f"many/{n}.txt", f"file number {n}")
    encode, store, existing = embedder.encode, collection.write, collection.existing
    threads, pages, begun, stored = set(), [], [], []

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def slow_encode(contents, **options):
        begun.append(len(contents))
        ahead = ends[min(len(begun), 7)]  # this batch takes until the next one is read
        until(lambda: len(pages) >= ahead)
        return encode(contents, **options)

    def slow_store(nodes, vectors, terms):
        threads.add(threading.get_ident())
        stored.append(len(nodes))
        until(lambda: len(begun) > min(len(stored), 7))  # until the next batch is being embedded
        store(nodes, vectors, terms)

    monkeypatch.setattr(embedder, "encode", slow_encode)
    monkeypatch.setattr(collection, "write", slow_store)
    monkeypatch.setattr(collection, "existing", lambda ids: pages.append(ids) or existing(ids))
    ingest(["many"], collection, embedder)
    assert stored == [4, 8, 16, 32, 32, 32, 32, 32]
    assert threads == {threading.get_ident()}
    assert collection.count() == 188


def test_progress(embedder, collection, files):
    write("in/broken.pdf", "no pdf")
    write("in/long.txt", long_text("long", 100))
    seen = []
    report = ingest(["in"], collection, embedder, progress=seen.append)
    assert [p.files_done for p in seen] == sorted(p.files_done for p in seen)
    assert [p.pages for p in seen] == sorted(p.pages for p in seen)
    last = seen[-1]
    assert (last.files_done, last.files_total) == (5, 5)
    assert (last.pages, last.failures) == (report.pages, len(report.errors)) == (4, 1)
    assert last.pages_per_second == pytest.approx(last.pages / last.seconds)
    assert last.pages_left == 0 and last.seconds_left == 0
    left = [p.pages_left for p in seen if p.pages_left is not None]
    assert left and all(0 <= n < 200 for n in left)
    assert {p.file for p in seen} >= {"in/long.txt", "in/broken.pdf"}


def fake_reading(monkeypatch, pages, produced, wait=0.0):
    def read_file(path, images_dir, options, on_error, sha256, name):
        for number in range(pages):
            time.sleep(wait)
            produced.append(number)
            yield ReadPage(number, [])

    monkeypatch.setattr(module, "read_file", read_file)


def test_ctrl_c_ends_the_threads_and_leaves_a_usable_collection(collection, files, monkeypatch):
    write("in/long.txt", long_text("long", 100))
    with pytest.raises(KeyboardInterrupt):
        ingest(["in"], collection, Interrupting(2, KeyboardInterrupt()), workers=4)
    assert not [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]
    stored = collection.count()
    report = ingest(["in"], collection, FakeEmbedder())
    assert report.failed == [] and collection.count() > stored


def test_reading_does_not_run_away(embedder, collection, files, monkeypatch):
    """The queue is bounded: a slow consumer holds the readers back."""
    produced = []
    fake_reading(monkeypatch, 500, produced)
    ahead = []

    def slow(self, job, page):
        time.sleep(0.001)
        ahead.append(len(produced) - len(ahead))

    monkeypatch.setattr(Writer, "_take_page", slow)
    ingest(["in"], collection, embedder, workers=2)
    assert len(produced) == 1500
    assert max(ahead) <= module._PAGES_AHEAD + 2 + 2


def test_an_unexpected_error_of_reading_is_raised(embedder, collection, files, monkeypatch):
    def read_file(*_):
        raise ZeroDivisionError("a bug")
        yield

    monkeypatch.setattr(module, "read_file", read_file)
    with pytest.raises(ZeroDivisionError):
        ingest(["in"], collection, embedder)


def test_a_full_disk_fails_the_file_and_keeps_it_unfinished(
    embedder, collection, files, monkeypatch
):
    real = module.read_file

    def read_file(path, *rest):
        yield from real(path, *rest)
        if path.name == "one.txt":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(module, "read_file", read_file)
        report = ingest(["in"], collection, embedder)
    assert report.failed == ["in/one.txt"]
    assert "No space left" in str(report.errors[0])
    assert list(collection.unfinished().values()) == ["in/one.txt"]
    assert ingest(["in"], collection, embedder).indexed == ["in/one.txt"]


def losing(monkeypatch, name, error):
    """Reading loses page 2 of the file ``name``, with an error that ``error`` makes."""
    real = module.read_file

    def read_file(path, images_dir, options, put, sha256, called):
        for page in real(path, images_dir, options, put, sha256, called):
            if path.name == name and page.page == 2:
                put(error)
            else:
                yield page

    monkeypatch.setattr(module, "read_file", read_file)


def two_pages(path, words):
    pdf = pymupdf.open()
    for number in (1, 2):
        pdf.new_page().insert_text((72, 72), f"{words} on page {number}")
    pdf.save(path)


def test_pages_lost_to_the_environment_are_read_by_the_next_run(
    embedder, collection, files, monkeypatch
):
    two_pages(files / "paper.pdf", "turbines")
    with monkeypatch.context() as lost:
        late = ReadError("took too long", file="in/paper.pdf", page=2, retry=True)
        losing(lost, "paper.pdf", late)
        report = ingest(["in/paper.pdf"], collection, embedder)
    assert (report.incomplete, report.indexed, report.failed) == (["in/paper.pdf"], [], [])
    (entry,) = collection.files()
    assert (entry.pages, entry.complete, entry.errors) == (1, False, (str(late),))
    encoded = embedder.encoded
    report = ingest(["in/paper.pdf"], collection, embedder)
    assert report.indexed == ["in/paper.pdf"] and not report.errors
    (entry,) = collection.files()
    assert (entry.pages, entry.complete, entry.errors) == (2, True, ())
    assert embedder.encoded == encoded + 2  # the image and the text of the page that was lost


def test_an_incomplete_new_version_leaves_the_old_one(embedder, collection, files, monkeypatch):
    two_pages(files / "paper.pdf", "turbines")
    ingest(["in/paper.pdf"], collection, embedder)
    two_pages(files / "paper.pdf", "propellers")
    with monkeypatch.context() as lost:
        losing(lost, "paper.pdf", ReadError("late", file="in/paper.pdf", page=2, retry=True))
        report = ingest(["in/paper.pdf"], collection, embedder)
    assert report.notes == ["in/paper.pdf: its earlier version stays in place."]
    assert len(found(collection, "turbines")) == 2
    report = ingest(["in/paper.pdf"], collection, embedder)
    assert report.replaced == ["in/paper.pdf"]
    assert found(collection, "turbines") == []
    assert len(found(collection, "propellers")) == 2


def test_a_defect_of_the_file_is_said_by_every_run(embedder, collection, files, monkeypatch):
    two_pages(files / "paper.pdf", "turbines")
    broken = ReadError("is broken", file="in/paper.pdf", page=2)
    losing(monkeypatch, "paper.pdf", broken)
    report = ingest(["in/paper.pdf"], collection, embedder)
    assert (report.errors, report.known_errors) == ([broken], [])
    report = ingest(["in/paper.pdf"], collection, embedder)
    assert report.unchanged == ["in/paper.pdf"]
    assert (report.errors, report.known_errors) == ([], [str(broken)])


def test_nodes_that_a_damaged_collection_has_lost_are_stored_again(embedder, collection, files):
    two_pages(files / "paper.pdf", "turbines")
    ingest(["in"], collection, embedder)
    whole, encoded = content(collection), embedder.encoded
    assert collection.damaged(collection.files()) == []
    collection._engine.delete(Filter(must=(Within("page", 2, 2),)))
    assert [entry.file for entry in collection.damaged(collection.files())] == ["in/paper.pdf"]
    ingest(["in"], collection, embedder)
    assert collection.damaged(collection.files()) == []
    payloads = [
        {id_: p for id_, (p, _) in stored.items()} for stored in (content(collection), whole)
    ]
    assert payloads[0] == payloads[1]
    assert embedder.encoded == encoded + 2


def test_where_finds_by_what_reading_knows(embedder, collection, files):
    write("in/notes.md", "# Turbines\n\nthey spin")
    ingest(["in"], collection, embedder)
    assert collection.count(Where(metadata={"section": "Turbines"})) == 1
    assert collection.count(Where(kinds=("text",), files=("notes.md",))) == 1


def test_killed_and_started_again(tmp_path, shared_data):
    reports = sorted((shared_data / "reports").glob("*.pdf"))[:3]
    assert kill_restart.check(tmp_path, reports, kills=2, seed=1) >= 1


@pytest.mark.slow
def test_killed_ten_times(tmp_path, shared_data):
    reports = [shared_data / "reports"]
    assert kill_restart.check(tmp_path, reports, kills=10, seed=2) >= 5


def test_pages_that_need_recognition_are_counted_once(files, collection, embedder):
    Image.effect_noise((64, 64), 60).save(files.parent / "scan.png")
    with pymupdf.open() as document:
        for _ in range(2):
            page = document.new_page()
            page.insert_image(page.rect, filename=files.parent / "scan.png")
        document.save(files / "scan.pdf")
    report = ingest(["in"], collection, embedder, options=OPTIONS)
    (note,) = [note for note in report.notes if "recognition" in note]
    assert "can read: 2." in note and "pip install 'mmrag[ocr]'" in note
    off = ReadOptions(dpi=50, passage_words=20, passage_overlap=0, ocr="off")
    assert reading_settings(off) == reading_settings(OPTIONS)  # may differ from run to run
    assert ingest(["in"], collection, embedder, options=off).notes == []
