"""Late interaction over the whole path: indexed, found first, compared token by token."""

import json

import numpy as np
import pytest
from fakes import FakeEmbedder, _noise
from llama_index.core.schema import TextNode
from PIL import Image
from tiny_late import save_colqwen2
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.embedders.late import LateInteraction
from mmrag.embedders.muvera import Muvera
from mmrag.errors import CollectionError, ConfigError, ContentError
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import System
from mmrag.evaluation.run import evaluate
from mmrag.index import UniversalIndex
from mmrag.ingest.run import ingest
from mmrag.queries import Where
from mmrag.reading.nodes import node_id
from mmrag.retrieval.late import late_rankings
from mmrag.store.collection import Collection
from mmrag.store.engine import Scored

FILES = {
    "wells.txt": "the old well is nine metres deep and the water is clear",
    "bridge.txt": "the bridge over the river is nine metres wide and forty metres long",
    "cheese.txt": "the cheese is ripe after nine weeks in the deep cellar",
    "empty.txt": "turbines",
}


class WordTokens:
    """One vector for each word of a text, the same wherever it stands."""

    name, fingerprint, dim, modalities = "words", "w1", 32, frozenset({"text"})

    def __init__(self):
        self.documents, self.queries = [], []

    def _tokens(self, text):
        vectors = np.array([_noise(word.encode(), self.dim) for word in text.lower().split()])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_documents(self, contents, pool_factor=1.0):
        self.documents += [content.text for content in contents]
        if any("POISON" in content.text for content in contents):
            raise ContentError("item 0: poisoned")
        return [self._tokens(content.text) for content in contents]

    def encode_query(self, text):
        self.queries.append(text)
        return self._tokens(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def open_index(path, late, **options):
    return UniversalIndex(path, FakeEmbedder(), late=late, **options)


@pytest.fixture(scope="module")
def library(folder, tmp_path_factory):
    late = LateInteraction(WordTokens(), muvera=Muvera(k_sim=3, repetitions=10))
    with open_index(tmp_path_factory.mktemp("library") / "c", late) as index:
        report = index.add(folder)
        assert not report.errors and report.nodes == len(FILES)
        yield index


def exact(query, text):
    words = WordTokens()
    return float((words._tokens(query) @ words._tokens(text).T).max(axis=1).sum())


QUESTION = "nine metres deep water"


def test_the_second_stage_is_exact_max_sim_over_what_was_found(library):
    retriever = library.as_retriever(explain=True)
    rankings = retriever.rankings(QUESTION)
    assert list(rankings) == ["image", "text", "bm25", "muvera", "tokens"]
    found = {hit.id for name in rankings if name != "tokens" for hit in rankings[name]}
    assert {hit.id for hit in rankings["tokens"]} == found
    for hit in rankings["tokens"]:
        expected = exact(QUESTION, text_of(library, hit))
        assert hit.score == pytest.approx(expected, abs=4 * 2**-11)
    scores = [hit.score for hit in rankings["tokens"]]
    assert scores == sorted(scores, reverse=True)
    best, second, *_ = retriever.search(QUESTION)
    assert best.node.metadata["file"].endswith("wells.txt")
    assert second.node.metadata["file"].endswith("bridge.txt")
    assert best.ranks["tokens"] == 1 and best.ranks["muvera"] >= 1
    assert best.view_scores["tokens"] == pytest.approx(
        exact(QUESTION, FILES["wells.txt"]), abs=0.01
    )


def text_of(index, hit):
    return index.collection.payloads([hit.id])[hit.id]["text"]


def test_muvera_alone_finds_what_max_sim_finds(library):
    weights = {"image": 0, "text": 0, "bm25": 0, "tokens": 0}
    retriever = library.as_retriever(weights=weights)
    rankings = retriever.rankings(QUESTION)
    assert list(rankings) == ["muvera"]
    best = max(FILES.values(), key=lambda text: exact(QUESTION, text))
    assert text_of(library, rankings["muvera"][0]) == best
    with pytest.raises(ConfigError, match="no ranking is left"):
        library.as_retriever(weights={**weights, "muvera": 0, "tokens": 1})


def test_the_page_of_a_passage_is_compared_too():
    """ColPali's tokens are those of the page, whatever of it was found by its words."""

    class Asked:
        def max_sim(self, tokens, ids, where, payload):
            self.ids = ids
            return []

    payload = {"sha256": "a" * 64, "page": 3, "kind": "passage"}
    found = {"bm25": [Scored("p1", 2.0, payload), Scored("p2", 1.0, payload)]}
    asked, late = Asked(), LateInteraction(WordTokens())
    weights = {"tokens": 1.0, "muvera": 1.0}
    late_rankings(asked, late, "well", found, limit=5, where=None, weights=weights)
    assert asked.ids == ["p1", "p2", node_id("a" * 64, 3, "page", 0)]


def test_only_what_the_filter_lets_through_is_compared(library):
    hits = library.as_retriever(where=Where(files=("bridge.txt", "cheese.txt"))).search(QUESTION)
    assert {hit.node.metadata["file"].rpartition("/")[2] for hit in hits} == {
        "bridge.txt",
        "cheese.txt",
    }
    assert all("tokens" in hit.ranks for hit in hits)


def test_a_question_by_image_has_no_second_stage(library):
    (hit, *_) = library.as_retriever().search(image=Image.new("RGB", (20, 20)))
    assert "tokens" not in hit.ranks


def test_the_fewest_first_hits_are_enough(library):
    """Nothing that no first stage found is compared."""
    weights = {"image": 0, "text": 0, "muvera": 0}
    rankings = library.as_retriever(weights=weights).rankings("turbines")
    assert [text_of(library, hit) for hit in rankings["tokens"]] == ["turbines"]


def test_unchanged_files_are_embedded_once_and_new_ones_need_the_model(folder, tmp_path):
    late = WordTokens()
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.txt").write_text("one")
    with open_index(tmp_path / "c", late) as index:
        index.add(files)
        index.add(files)
        assert late.documents == ["one"]
    with UniversalIndex(tmp_path / "c", FakeEmbedder()) as index:
        assert index.add(files).unchanged  # the name "words" is no model: it is not loaded
    asks = pytest.raises(CollectionError, match="keeps tokens of 'words': give late")
    with Collection.open(tmp_path / "c") as collection, asks:
        ingest([files], collection, FakeEmbedder())


def test_a_page_whose_tokens_fail_is_reported_and_keeps_its_other_vectors(tmp_path):
    for name, text in {"good.txt": "well", "bad.txt": "POISON well"}.items():
        (tmp_path / name).write_text(text)
    embedder = FakeEmbedder(poison="nothing")
    with UniversalIndex(tmp_path / "c", embedder, late=WordTokens()) as index:
        report = index.add([tmp_path / "good.txt", tmp_path / "bad.txt"])
        (error,) = report.errors
        assert "bad.txt" in str(error) and "tokens view" in str(error)
        rankings = index.as_retriever().rankings("well")
        assert len(rankings["text"]) == 2
        assert [text_of(index, hit) for hit in rankings["tokens"]] == ["well"]


def test_inserted_nodes_have_tokens_too(tmp_path):
    with UniversalIndex(tmp_path / "c", FakeEmbedder(), late=WordTokens()) as index:
        index.insert_nodes([TextNode(text="the well is deep"), TextNode(text="cheese")])
        found = index.as_retriever().rankings("deep well")["tokens"]
        assert found[0].score == pytest.approx(2, abs=0.01)
        poisoned = [TextNode(text="POISON"), TextNode(text="a well")]
        with pytest.raises(ContentError, match="its tokens view has no vector"):
            index.insert_nodes(poisoned)
        assert index.collection.count() == 3


def test_other_ways_to_keep_tokens_are_refused(library):
    location = library.collection.folder
    library.close()
    other = WordTokens()
    other.fingerprint = "w2"
    muvera = Muvera(k_sim=3, repetitions=10)
    for late in (other, LateInteraction(WordTokens(), 2, muvera), LateInteraction(WordTokens())):
        with pytest.raises(
            CollectionError, match=r"late: 'words' \(fingerprint w1\), pool_f.* not"
        ):
            open_index(location, late)
    with pytest.raises(ConfigError, match="'fake' gives one vector for a page"):
        open_index(location, FakeEmbedder())
    with open_index(location, LateInteraction(WordTokens(), muvera=muvera)) as index:
        assert index.as_retriever().search(QUESTION)[0].ranks["tokens"] == 1


def test_from_the_command_line(tmp_path):
    """A tiny ColQwen2 in place of vidore/colqwen2-v1.0-hf: kept, remembered, and compared."""
    pytest.importorskip("sentence_transformers")
    model = save_colqwen2(tmp_path / "colqwen2")
    chance = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        noise = chance.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    where = ("-c", tmp_path / "library")
    made = run("index", pictures, *where, "--late", model, "--pool-factor", 2, "--muvera")
    assert made.exit_code == 0, made.output
    found = run("search", "which page", *where, "--json", "--explain")
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["hits"]) == 3
    assert '"tokens"' in found.stdout and '"muvera"' in found.stdout
    assert run("index", pictures, *where, "--late", "mmrag-nano").exit_code == 3
    assert run("index", pictures, *where, "--muvera").exit_code == 2


def test_tokens_are_evaluated_beside_the_other_rankings(folder, tmp_path):
    late = LateInteraction(WordTokens(), muvera=Muvera(k_sim=3, repetitions=10))
    asked = [Question(FILES[name], ((name, 1),), id=name) for name in list(FILES)[:3]]
    with open_index(tmp_path / "c", late) as library:
        library.add(folder)
        found = evaluate(library, asked, dims=(8,), scopes=("corpus",))
        retriever = library.as_retriever(similarity_top_k=10)
        fused = {question.id: retriever.search(question.text) for question in asked}
    assert found.scores(System("fake", "tokens"))["hit@1"].mean == 1.0
    assert System("fake", "muvera") in found.found
    assert System("fake", "tokens", dim=8) not in found.found
    for id_, ranked in found.rankings[System("fake", "fusion")].items():
        names = [hit.metadata["file"].split("/")[-1] for hit in fused[id_]]
        assert [file for (file, _), _ in ranked] == names
