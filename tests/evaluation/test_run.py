"""The evaluation of libraries: what is ranked, kept, resumed and noted."""

import json

import numpy as np
import pytest
from fakes import FakeEmbedder

from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation, System
from mmrag.evaluation.run import evaluate
from mmrag.index import UniversalIndex


def without_seconds(evaluation):
    return {**evaluation.to_json(), "info": None}


def test_each_ranking_is_measured_on_its_own(library, questions):
    found = evaluate(library, questions)
    assert [system.name for system in found.systems()] == [
        "text",
        "bm25",
        "fusion",
        "fusion by ranks",
    ]
    bm25, text = System("fake", "bm25"), System("fake", "text")
    assert found.scores(bm25)["hit@1"].mean == 1.0
    assert found.scores(text)["hit@1"].mean == 0.0  # the vectors point elsewhere
    assert found.scores(text)["hit@10"].mean > 0.5
    assert found.scores(bm25, "first half")["ndcg@10"].n == 12


def test_fusions_are_what_the_retriever_returns(library, questions):
    found = evaluate(library, questions)
    for name, options in {"fusion": {}, "fusion by ranks": {"fuse_by": "ranks"}}.items():
        retriever = library.as_retriever(similarity_top_k=10, **options)
        for question in questions:
            hits = retriever.search(question.text)
            pages = [(hit.metadata["file"], hit.metadata["page"]) for hit in hits]
            ranked = found.rankings[System("fake", name)][question.id]
            assert [page for page, _ in ranked] == pages


def test_inside_the_document_only_its_pages_compete(library, questions):
    found = evaluate(library, questions)
    for system in found.systems("document"):
        for question in questions:
            pages = [page for page, _ in found.rankings[system][question.id]]
            assert {file for file, _ in pages} == {question.document}


def test_fewer_dimensions_are_searched_exactly(library, questions):
    found = evaluate(library, questions, dims=(8, 64))
    whole, same = System("fake", "text"), System("fake", "text", dim=64)
    assert found.found[whole] == found.found[same]
    # Words are searched as before.
    assert found.found[System("fake", "fusion")] == found.found[System("fake", "fusion", dim=64)]
    assert System("fake", "bm25", dim=8) not in found.found
    nodes, vectors = library.collection.vectors("text")
    short = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    for scope in ("corpus", "document"):
        ranked = found.rankings[System("fake", "text", dim=8, scope=scope)]
        for question in questions[:5]:
            query = library.embedder.encode([question.text])[0, :8]
            scores = short @ query / np.linalg.norm(query)
            wanted = [
                (nodes[i].payload["file"], nodes[i].payload["page"])
                for i in np.argsort(-scores, kind="stable")
                if scope == "corpus" or nodes[i].payload["file"] == question.document
            ]
            assert [page for page, _ in ranked[question.id]] == wanted


def test_a_dimension_that_the_model_lacks_is_refused(library, questions):
    with pytest.raises(ConfigError, match="dim=65"):
        evaluate(library, questions, dims=(65,))


def test_a_reranker_reorders_the_fusion(library, questions):
    class Backwards:
        def postprocess_nodes(self, nodes, query_bundle):
            return nodes[::-1]

    found = evaluate(library, questions, rerankers={"backwards": [Backwards()]}, cuts=(1, 5))
    system = System("fake", "fusion", reranker="backwards")
    hits = library.as_retriever(similarity_top_k=15).search(questions[0].text)
    pages = [(hit.metadata["file"], hit.metadata["page"]) for hit in hits[::-1]]
    assert [page for page, _ in found.rankings[system][questions[0].id]] == pages


def test_a_run_that_is_stopped_goes_on(library, questions, embedder, tmp_path):
    keep = tmp_path / "work" / "kept.jsonl"

    def stop(now):
        if now.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(library, questions, keep=keep, progress=stop)
    asked = embedder.encoded
    assert asked == 10  # ten are done, and the eleventh was not begun
    keep.write_text(keep.read_text()[:-40])  # the last line was cut short
    resumed = evaluate(library, questions, keep=keep)
    assert embedder.encoded == asked + 1 + len(questions) - 10
    again = evaluate(library, questions, keep=keep)
    assert embedder.encoded == asked + 1 + len(questions) - 10
    plain = evaluate(library, questions)
    assert without_seconds(resumed) == without_seconds(again) == without_seconds(plain)


def test_what_moves_the_numbers_is_asked_anew(library, questions, embedder, tmp_path):
    keep = tmp_path / "kept.jsonl"

    def asks(**options):
        before = embedder.encoded
        evaluate(library, questions, keep=keep, **options)
        return embedder.encoded - before

    assert asks() == len(questions)
    assert asks() == 0
    assert asks(cuts=(1, 5)) == len(questions)
    assert asks(dims=(32,)) == len(questions)
    library.collection.save_weights({"text": 0.5})
    assert asks() == len(questions)
    questions[0] = Question("another question", questions[0].pages, id="q1")
    assert asks() == 1


def test_a_question_that_cannot_be_embedded_is_noted_and_counts_as_missed(library, questions):
    questions[3] = Question("POISON", questions[3].pages, id="q4")
    found = evaluate(library, questions)
    assert [note.split(":")[0] for note in found.notes] == ["question q4 could not be asked"]
    assert found.scores(System("fake", "bm25"))["hit@1"].mean == pytest.approx(23 / 24)


def test_documents_that_are_not_there_are_noted(library, questions):
    absent = Question("dental report z", (("z.pdf", 4),))
    found = evaluate(library, [*questions, absent])
    assert found.notes == ["fake: z.pdf is not in the collection; its pages count as not found"]
    with pytest.raises(ContentError, match=r"none of the files .*z\.pdf"):
        evaluate(library, [absent])
    with pytest.raises(ContentError, match="No question has a right page"):
        evaluate(library, [Question("why?", answerable=False)])


def test_several_libraries_side_by_side(library, questions):
    found = evaluate({"one": library, "two": library}, questions, scopes=("corpus",))
    one, two = ([s for s in found.systems() if s.model == model] for model in ("one", "two"))
    assert [found.scores(system) for system in one] == [found.scores(system) for system in two]


@pytest.mark.parametrize("options", [{"cuts": ()}, {"cuts": (5, 1)}, {"cuts": (0,)}])
def test_cuts_that_make_no_sense_are_refused(library, questions, options):
    with pytest.raises(ConfigError, match="cuts="):
        evaluate(library, questions, **options)


def test_what_is_saved_is_read_back(library, questions, tmp_path):
    found = evaluate(library, questions, dims=(8,))
    found.save(tmp_path / "found.json")
    read = Evaluation.load(tmp_path / "found.json")
    assert read.to_json() == found.to_json()
    for system in found.found:
        assert read.scores(system) == found.scores(system)
    for text in ("", "[]", '{"version": 9}', '{"version": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ContentError, match=r"bad\.json"):
            Evaluation.load(tmp_path / "bad.json")


def test_batch_sizes_of_1_3_and_16_give_the_same_numbers(qwen2_vl_folder, tmp_path):
    """Documents go through the model one, three or sixteen at a time; questions one by one."""
    names = ("boilers", "dentists", "falcons", "gardens", "harbours", "engines")
    for name in names:
        lines = [f"The {name} of the town cost {n},577 euros in all." for n in range(1, 4)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines * 8))
    asked = [Question(f"What do {name} cost in town?", ((f"{name}.txt", 1),)) for name in names]
    results = []
    for size in (1, 3, 16):
        one = load_embedder(qwen2_vl_folder, family="gme", device="cpu", token_budget=10_000)
        longest = max(
            one._plan(0, content).n_tokens
            for content in map(_content, (tmp_path / f"{name}.txt" for name in names))
        )
        embedder = load_embedder(
            qwen2_vl_folder, family="gme", device="cpu", token_budget=size * longest
        )
        with UniversalIndex(tmp_path / f"c{size}", embedder) as index:
            index.add([tmp_path / f"{name}.txt" for name in names])
            results.append(without_seconds(evaluate({"tiny": index}, asked)))
    assert results[0]["systems"]
    assert results[0] == results[1] == results[2]


def _content(path):
    from mmrag.content import Content

    return Content(path.read_text())


def test_the_file_of_results_is_plain_json(library, questions, tmp_path):
    found = evaluate(library, questions)
    found.save(tmp_path / "found.json")
    values = json.loads((tmp_path / "found.json").read_text())
    row = next(row for row in values["systems"] if row["ranking"] == "bm25")
    assert row["found"]["q1"] == {"a.pdf#1": 1}
    assert row["metrics"]["hit@1"] == [1.0, 1.0, 1.0]
    assert FakeEmbedder().name == row["model"]
