"""A converted collection answers as the first one does, from its own files."""

import shutil

import numpy as np
import pymupdf
import pytest
from fakes import FakeEmbedder
from llama_index.core.schema import TextNode
from qdrant_client import QdrantClient
from typer.testing import CliRunner

from mmrag.errors import CollectionError, ConfigError
from mmrag.index import UniversalIndex
from mmrag.nodes import node_image
from mmrag.queries import Where
from mmrag.reading import words_path
from mmrag.store.collection import Collection, CollectionSettings
from mmrag.store.optimizing import WORTH_BYTES


@pytest.fixture
def library(tmp_path):
    """Two pages of a PDF, a text, and an inserted node."""
    papers = tmp_path / "papers"
    papers.mkdir()
    pdf = pymupdf.open()
    for text in ("Turbines turn in the wind.", "The well is nine metres deep."):
        pdf.new_page().insert_text((72, 72), text)
    pdf.save(papers / "a.pdf")
    (papers / "b.txt").write_text("eye exams are covered by the plus plan")
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.add(papers)
        index.insert_nodes([TextNode(text="The gate sticks in winter.", id_="own")])
        index.collection.save_weights({"text": 0.25, "bm25": 0.75})
        yield index


def found(index, question="How deep is the well?"):
    hits = index.as_retriever(similarity_top_k=5).retrieve(question)
    return [(hit.node.metadata.get("page"), hit.text, round(hit.score, 4)) for hit in hits]


def test_a_converted_collection_finds_the_same_without_the_first(library, tmp_path):
    expected, files = found(library), library.files()
    library.convert(tmp_path / "new")
    library.close()
    shutil.rmtree(tmp_path / "library")
    with UniversalIndex(tmp_path / "new", FakeEmbedder()) as new:
        assert found(new) == expected
        assert new.files() == files
        assert new.collection.weights == {"text": 0.25, "bm25": 0.75}
        assert not new.collection.examine().altered
        page = next(
            hit
            for hit in new.as_retriever(similarity_top_k=5).retrieve("well")
            if hit.node.metadata.get("page") == 2
        )
        image = node_image(page.node) or page.node.metadata["page_image"]
        assert (tmp_path / "new") in image.parents and image.is_file()
        assert words_path(image).is_file()
        assert len(new.add(tmp_path / "papers").unchanged) == 2


def test_to_a_server_and_back(library, tmp_path):
    expected = found(library)
    place = {"location": QdrantClient(":memory:"), "images_dir": tmp_path / "images"}
    n_points = library.convert(**place)
    on_server = UniversalIndex(**place, embed_model=FakeEmbedder())
    assert found(on_server) == expected
    assert on_server.convert(tmp_path / "back") == n_points
    with UniversalIndex(tmp_path / "back", FakeEmbedder()) as back:
        assert found(back) == expected


@pytest.mark.parametrize("images", [None, "images-elsewhere"])
def test_uploads_go_along(library, tmp_path, images):
    """The first folder can be deleted: files that a server took are in the new one."""
    uploads = tmp_path / "library" / "uploads"
    uploads.mkdir()
    upload = uploads / "manual.txt"
    upload.write_text("the pump is oiled in spring")
    (uploads / ".incoming-1").mkdir()
    library.add(upload)
    images_dir = None if images is None else tmp_path / images
    library.convert(tmp_path / "new", images_dir=images_dir)
    library.close()
    shutil.rmtree(tmp_path / "library")
    expected = tmp_path / ("new/uploads" if images is None else "images-elsewhere-uploads")
    with UniversalIndex(tmp_path / "new", FakeEmbedder(), images_dir=images_dir) as new:
        (moved,) = (entry for entry in new.files() if entry.path.name == "manual.txt")
        assert moved.path == expected / "manual.txt"
        assert moved.path.read_text() == "the pump is oiled in spring"
        assert [each.name for each in expected.iterdir()] == ["manual.txt"]
        (hit,) = new.as_retriever(where=Where(files=(str(moved.path),))).retrieve("pump")
        assert hit.node.metadata["file_path"] == moved.path.as_posix()
        assert new.add(expected).unchanged == [str(moved.path)]
        assert not new.collection.examine().altered
        # Files from elsewhere stay where they are.
        assert {entry.path.parent for entry in new.files()} >= {tmp_path / "papers"}


def test_vectors_are_cut_and_scaled(library, tmp_path):
    library.convert(tmp_path / "new", dim=16)
    with UniversalIndex(tmp_path / "new", FakeEmbedder()) as new:
        assert new.collection.settings.dim == 16
        whole, cut = (index.collection.vectors("text") for index in (library, new))
        assert [node.id for node in whole[0]] == [node.id for node in cut[0]]
        expected = whole[1][:, :16] / np.linalg.norm(whole[1][:, :16], axis=1, keepdims=True)
        np.testing.assert_allclose(cut[1], expected, atol=1e-6)
        assert found(new)[0][1] == found(library)[0][1]


@pytest.mark.parametrize("dim", [0, 33])
def test_a_dimension_that_is_not_there_is_refused(library, tmp_path, dim):
    with pytest.raises(ConfigError, match="dim="):
        library.convert(tmp_path / "new", dim=dim)
    assert not (tmp_path / "new").exists()


def test_a_dimension_that_was_not_trained_is_refused(library, tmp_path):
    library.embedder.matryoshka_dims = (8,)
    with pytest.raises(ConfigError, match="trained for 8, 32"):
        library.convert(tmp_path / "new", dim=16)


def test_a_conversion_cut_short_is_continued(library, tmp_path, monkeypatch):
    from mmrag.store import convert

    monkeypatch.setattr(convert, "_BATCH_POINTS", 2)

    def stop(done, total):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.convert(tmp_path / "new", progress=stop)
    with UniversalIndex(tmp_path / "new", FakeEmbedder()) as new:
        assert new.files() == []  # nothing counts as stored before all of it is
        there = new.collection.count_points()
    assert library.convert(tmp_path / "new") == library.collection.count_points() - there
    with UniversalIndex(tmp_path / "new", FakeEmbedder()) as new:
        assert found(new) == found(library)
        assert new.files() == library.files()


def test_another_collection_is_not_written_over(library, tmp_path):
    with UniversalIndex(tmp_path / "other", FakeEmbedder(name="other")) as other:
        other.add(tmp_path / "papers" / "b.txt")
    with pytest.raises(CollectionError, match="built by"):
        library.convert(tmp_path / "other")


@pytest.mark.parametrize("quantization", ["int8", "binary"])
def test_quantized_vectors_find_what_exact_search_finds(tmp_path, quantization):
    """Codes are searched, and the vectors themselves decide: scores are exact."""
    rng = np.random.default_rng(0)
    # In clusters, as vectors of models are: the nearest of vectors without any are all as far.
    # Enough that codes are made: until then, the engine searches the vectors themselves.
    # More in each than the ten asked for: codes confuse which of them are nearest.
    rows = rng.standard_normal((370, 256)).repeat(30, axis=0)
    assert rows[:, 0].size * 256 * 4 > WORTH_BYTES
    rows = (rows + 0.7 * rng.standard_normal(rows.shape)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    settings = CollectionSettings("m", "1", 256, ("text",), quantization=quantization)
    with Collection.open(tmp_path / "library", settings=settings) as collection:
        nodes = [TextNode(text=f"node {n}") for n in range(len(rows))]
        collection.write(nodes, [{"text": row} for row in rows])
        collection.optimize()
        asked = rows[:11000:550] + 0.03 * rng.standard_normal((20, 256)).astype(np.float32)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
        n_found = 0
        for vector in asked:
            hits = collection.search("text", vector, 10)
            exact = np.sort(rows @ vector)[::-1][:10]
            scores = np.array([hit.score for hit in hits])
            assert scores[0] == pytest.approx(exact[0], abs=1e-5)
            n_found += int(np.isclose(scores[:, None], exact, atol=1e-5).any(axis=1).sum())
        assert n_found >= 195  # of 200
    with Collection.open(tmp_path / "library") as again:
        assert again.settings == settings


def test_an_unknown_quantization_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="none, int8, binary"):
        UniversalIndex(tmp_path / "library", FakeEmbedder(), quantization="int4").add(__file__)


def test_the_command(library, tmp_path):
    from mmrag.cli.app import app

    library.close()
    target = str(tmp_path / "new")
    arguments = ["convert", target, "-c", str(tmp_path / "library"), "--quantization", "int8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "points copied" in done.output
    with UniversalIndex(target, FakeEmbedder()) as new:
        assert new.collection.settings.quantization == "int8"
