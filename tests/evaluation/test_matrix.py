"""Drafts, the matrix of kinds, and nuggets: counted as one would by hand."""

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest
from chat_server import ChatServer
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.errors import ContentError, EndpointError
from mmrag.evaluation.answers import AnswerRecord, nugget_scores
from mmrag.evaluation.engines import answer_all
from mmrag.evaluation.judge import assign_nuggets
from mmrag.evaluation.matrix import compare_matrices, matrix_tables
from mmrag.evaluation.questions import Nugget, Question, read_questions
from mmrag.evaluation.report import write_report
from mmrag.evaluation.results import Evaluation, System
from mmrag.llms.endpoint import open_llm

FUSION = System("m", "fusion")
WIDE = {"COLUMNS": "200"}


@pytest.fixture
def judge():
    server = ChatServer(models=[{"id": "judge"}])
    server.llm = open_llm("judge", server.url, "x")
    yield server
    server.close()


def row(n, **more):
    return {"question": f"Which {n}?", "pages": [{"file": "a.pdf", "page": n}], **more}


def write(path, rows):
    path.write_text("\n".join(json.dumps(each) for each in rows))
    return path


def test_only_accepted_rows_count_and_the_rest_is_said(tmp_path, caplog):
    statuses = [{"status": "accepted"}, {"status": "draft"}, {}, {"status": "rejected"}]
    path = write(tmp_path / "q.jsonl", [row(n, **each) for n, each in enumerate(statuses, 1)])
    with caplog.at_level(logging.WARNING):
        questions = read_questions(path)
    assert [question.text for question in questions] == ["Which 1?", "Which 3?"]
    assert "2 of 4 questions are not accepted" in caplog.text
    with pytest.raises(ContentError, match="no question that is accepted"):
        read_questions(write(path, [row(1, status="draft")]))


def test_nuggets_and_kinds_are_read_and_saved(tmp_path):
    nuggets = [{"text": "It is deep."}, {"text": "It is wet.", "vital": False}]
    path = write(tmp_path / "q.jsonl", [row(1, nuggets=nuggets, kind="a", document_kind="b")])
    (question,) = read_questions(path)
    assert question.nuggets == (Nugget("It is deep."), Nugget("It is wet.", vital=False))
    record = AnswerRecord("Deep.", nuggets=("support", "not_support"))
    found = Evaluation([question], {FUSION: {"q1": {}}}, {"e": {"q1": record}})
    found.save(tmp_path / "r.json")
    again = Evaluation.load(tmp_path / "r.json")
    assert again.questions == [question]
    assert again.answers == found.answers
    with pytest.raises(ContentError, match="give a question"):
        read_questions(write(path, [row(1, nuggets=[{"vital": True}])]))


def test_nugget_scores_by_hand():
    nuggets = [Nugget("a"), Nugget("b"), Nugget("c", vital=False), Nugget("d", vital=False)]
    found = nugget_scores(nuggets, ["support", "partial_support", "support", "not_support"])
    assert found == {
        "nuggets": (1 + 0.5 + 1 + 0) / 4,
        "nuggets_strict": 2 / 4,
        "nuggets_vital": (1 + 0.5) / 2,
        "nuggets_vital_strict": 1 / 2,
        "nuggets_weighted": (1 + 0.5 + 0.5 * 1) / (2 + 0.5 * 2),
        "nuggets_weighted_strict": (1 + 0.5 * 1) / (2 + 0.5 * 2),
    }
    none_vital = nugget_scores([Nugget("c", vital=False)], ["support"])
    assert not [name for name in none_vital if "vital" in name]


def test_the_judge_is_asked_ten_nuggets_at_a_time(judge):
    question = Question("What?", nuggets=tuple(Nugget(f"fact {n}") for n in range(12)))
    judge.answer = json.dumps({"labels": ["support"] * 10})
    # Two are left for the second request, whose ten labels fit none of them.
    with pytest.raises(EndpointError, match="not 2 labels"):
        assign_nuggets(judge.llm, question, AnswerRecord("All of it [1]."))
    asked = [body["messages"][-1]["content"] for body in judge.requests]
    first, second = (text if isinstance(text, str) else text[0]["text"] for text in asked)
    assert "10. fact 9" in first
    assert "fact 10" not in first
    assert "2. fact 11" in second
    assert "All of it." in first


def test_answers_are_given_labels_and_kept(judge, library, monkeypatch):
    from mmrag.evaluation.kept import Kept

    judge.answer = 'Sure: {"labels": ["Support", "partial_support"], "support": "full_support"}'
    asked = [
        Question(
            "apple report a", (("a.pdf", 1),), id="q1", nuggets=(Nugget("x"), Nugget("y", False))
        )
    ]
    kept = Kept()
    engine = library.as_query_engine()
    records = answer_all(engine, asked, judge=judge.llm, kept=kept)
    if records["q1"].found:
        assert records["q1"].nuggets == ("support", "partial_support")
        # Once for the nuggets, and once for each sentence that cites.
        assert len(judge.requests) == 1 + len(records["q1"].sentences)
    else:
        assert records["q1"].nuggets == ("not_support", "not_support")
    n = len(judge.requests)
    assert answer_all(engine, asked, judge=judge.llm, kept=kept) == records
    assert len(judge.requests) == n


@pytest.fixture
def evaluation():
    ranks = {"q1": 1, "q2": 2, "q3": 1, "q4": None, "q5": 1}
    kinds = {
        "q1": ("extraction", "manual"),
        "q2": ("extraction", "manual"),
        "q3": ("extraction", "report"),
        "q4": ("summary", "manual"),
        "q5": ("summary", "manual"),
    }
    questions = [
        Question("?", ((f"{id_}.pdf", 1),), kind, "9", id=id_, document_kind=of)
        for id_, (kind, of) in kinds.items()
    ]
    found = {id_: {(f"{id_}.pdf", 1): r} if r else {} for id_, r in ranks.items()}
    answers = {id_: AnswerRecord("9" if id_ != "q2" else "8") for id_ in kinds}
    return Evaluation(questions, {FUSION: found}, {"e": answers})


def test_each_cell_has_its_questions_alone(evaluation):
    cells = {(cell.kind, cell.document_kind): cell for cell in evaluation.matrix()}
    assert {key: cell.n for key, cell in cells.items()} == {
        ("extraction", "manual"): 2,
        ("extraction", "report"): 1,
        ("summary", "manual"): 2,
    }
    extraction = cells["extraction", "manual"]
    assert extraction.retrieval.mean == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert extraction.answers["e"]["contains"].mean == 0.5
    assert cells["summary", "manual"].retrieval.mean == 0.5
    # Two documents, right and wrong: the bootstrap draws both, one of them twice, or the other.
    assert (cells["summary", "manual"].retrieval.low, extraction.retrieval.high) == (0.0, 1.0)


def test_tables_and_report_show_every_cell(evaluation, tmp_path):
    retrieval, answers = matrix_tables(evaluation)
    assert retrieval.columns == ["manual", "report"]
    assert [kind for kind, _ in retrieval.rows] == ["extraction", "summary"]
    assert retrieval.rows[1][1][1] is None
    assert answers.title == "e: contains the right answer"
    assert answers.rows[0][1][0].mean == 0.5
    write_report(evaluation, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "By kind of question and of document" in html
    assert "e: contains the right answer" in html


def test_the_matrix_is_in_the_json(evaluation, tmp_path):
    cells = {(row["kind"], row["document_kind"]): row for row in evaluation.to_json()["matrix"]}
    assert list(cells) == [(cell.kind, cell.document_kind) for cell in evaluation.matrix()]
    cell = cells["extraction", "manual"]
    assert cell["n"] == 2
    mean, low, high, n = cell["retrieval"]
    assert (mean, low, high, n) == (0.815465, 0.63093, 1.0, 2)
    assert cell["answers"]["e"]["contains"] == [0.5, 0.0, 1.0, 2]
    # One document has no interval, and NaN is no JSON.
    assert cells["extraction", "report"]["retrieval"] == [1.0, None, None, 1]
    evaluation.save(tmp_path / "r.json")
    read = json.loads((tmp_path / "r.json").read_text())
    again = Evaluation.from_json(read)
    assert again.to_json()["matrix"] == evaluation.to_json()["matrix"] == read["matrix"]


def test_cells_are_compared(evaluation, tmp_path):
    better = copy.deepcopy(evaluation)
    better.found[FUSION]["q2"] = {("q2.pdf", 1): 1}
    better.answers["e"]["q2"] = AnswerRecord("9")
    found = compare_matrices(evaluation, better)
    by_cell = {(one.scope, one.metric, one.kind, one.document_kind): one for one in found}
    gained = by_cell["corpus", "ndcg@10", "extraction", "manual"]
    assert gained.gain == pytest.approx((1 - 1 / np.log2(3)) / 2)
    assert (gained.low, gained.n) == (0.0, 2)
    assert by_cell["answers", "contains", "extraction", "manual"].gain == 0.5
    assert by_cell["corpus", "ndcg@10", "summary", "manual"].gain == 0.0
    assert {one.metric for one in found if one.scope == "corpus"} == {"ndcg@10"}
    names = [tmp_path / "a.json", tmp_path / "b.json"]
    evaluation.save(names[0])
    better.save(names[1])
    shown = CliRunner().invoke(app, ["eval", "--compare", *map(str, names)], env=WIDE)
    assert shown.exit_code == 0, shown.output
    assert "e: contains the right answer, by kind of question and of document" in shown.output
    assert "+0.500  [+0.000, +1.000] of 2" in shown.output
    # The kinds of each system and engine are there as well.
    row = json.loads(names[0].read_text())["systems"][0]
    assert row["kinds"]["summary"]["hit@1"][0] == 0.5
    # Two kinds of documents make a matrix, one does not.
    evaluation.questions = evaluation.questions[:2]
    assert compare_matrices(evaluation, better) == []


def test_abstention_has_a_table_of_its_own(evaluation):
    none = Question("?", kind="unanswerable", answerable=False, id="q6", document_kind="manual")
    evaluation.questions = [*evaluation.questions, none]
    evaluation.answers["e"]["q6"] = AnswerRecord("No.", found=False)
    tables = {table.title: table for table in matrix_tables(evaluation)}
    abstained = tables["e: abstained, of those without an answer"]
    # Kinds that have no such question are left out, and so is this one of the others.
    assert abstained.columns == ["manual"]
    assert [(kind, [s.mean for s in scores]) for kind, scores in abstained.rows] == [
        ("unanswerable", [1.0])
    ]
    assert [kind for kind, _ in tables["ndcg@10"].rows] == ["extraction", "summary"]
    # Beside others, it counts for answers and not for retrieval.
    none = dataclasses.replace(none, kind="summary", id="q7")
    evaluation.questions = [*evaluation.questions, none]
    evaluation.answers["e"]["q7"] = AnswerRecord("No.", found=False)
    row = next(row for row in evaluation.to_json()["matrix"] if row["kind"] == "summary")
    assert (row["n"], row["retrieval"][3], row["answers"]["e"]["abstained"][3]) == (3, 2, 1)


def test_one_kind_of_document_makes_no_matrix(evaluation):
    evaluation.questions = evaluation.questions[:2]
    assert evaluation.matrix() == []
    assert matrix_tables(evaluation) == []
