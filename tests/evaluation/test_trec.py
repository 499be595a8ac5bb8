"""TREC runs and qrels: what is written is read back, and trec_eval reads it alike."""

import pytest

from mmrag.errors import ContentError
from mmrag.evaluation import trec
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import System
from mmrag.evaluation.run import evaluate


def test_a_run_is_read_back_in_its_order(tmp_path):
    tied = [(("a b.pdf", 1), 0.5), (("z#1.pdf", 2), 0.5), (("a b.pdf", 3), 0.5), (("c", 9), 0.4)]
    trec.write_run(tmp_path / "r.run", "my run, of today", {"q1": tied, "q2": []})
    tag, run = trec.read_run(tmp_path / "r.run")
    assert tag == "my-run-of-today"
    assert list(run) == ["q1"]
    assert [page for page, _ in run["q1"]] == [page for page, _ in tied]
    assert all(len(line.split()) == 6 for line in (tmp_path / "r.run").read_text().splitlines())


def test_qrels_are_read_back_with_their_grades(tmp_path):
    graded = Question("x", (("a b.pdf", 1),), id="q1", grades={("a b.pdf", 1): 3.0, ("c", 2): 1.0})
    trec.write_qrels(tmp_path / "q", [graded, Question("y", (("d", 1),), id="q2")])
    found = trec.read_qrels(tmp_path / "q")
    assert found == {"q1": graded.grades, "q2": {("d", 1): 1.0}}
    (tmp_path / "q").write_text("q1 0 a.pdf#1 0\n")
    assert trec.read_qrels(tmp_path / "q") == {"q1": {}}


def test_qrels_take_the_place_of_the_pages():
    asked = [Question("x", (("a", 1),), id="q1"), Question("y", (("b", 1),), id="q2")]
    first, second = trec.with_qrels(asked, {"q1": {("c", 3): 2.0}})
    assert (first.relevant, first.document) == ({("c", 3): 2.0}, "c")
    assert not second.relevant
    with pytest.raises(ContentError, match="none of the questions; they name x1"):
        trec.with_qrels(asked, {"x1": {}})


@pytest.mark.parametrize(
    "line", ["q1 Q0 a.pdf#1 1 0.5", "q1 Q0 a.pdf#1 one 0.5 t", "q1 Q0 a.pdf 1 0.5 t", ""]
)
def test_lines_that_are_none_are_named(tmp_path, line):
    path = tmp_path / "r.run"
    path.write_text(f"q1 Q0 a.pdf#1 1 0.5 t\n{line}\n" if line else "\n")
    with pytest.raises(ContentError, match=r"r\.run:2" if line else "empty"):
        trec.read_run(path)


def test_trec_eval_gives_the_same_numbers_for_the_runs_we_write(library, questions, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    found = evaluate(library, questions)
    paths = trec.save_runs(found, tmp_path)
    with paths[0].open() as file:
        qrels = pytrec_eval.parse_qrel(file)
    names = {"recip_rank": "mrr@10", "ndcg_cut_10": "ndcg@10", "success_5": "hit@5"}
    assert len(paths) == 1 + len(found.found)
    for path, system in zip(paths[1:], found.rankings, strict=True):
        with path.open() as file:
            run = pytrec_eval.parse_run(file)
        # Ranks beyond the deepest cut count for trec_eval's reciprocal rank.
        run = {q: dict(sorted(p.items(), key=lambda x: -x[1])[:10]) for q, p in run.items()}
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "ndcg_cut", "success"})
        rows = theirs.evaluate(run).values()
        for name, ours in names.items():
            mean = sum(row[name] for row in rows) / len(rows)
            assert mean == pytest.approx(found.scores(system)[ours].mean, abs=1e-6)
    assert System("fake", "text", scope="document") in found.rankings
